"""Everything that can go wrong in a way a user can mend. The command line catches `DtlError` and nothing else.

A message is one or two lines: what is wrong, where (file, key, row), what to do.
"""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


def nearest(word: str, known: Iterable[str]) -> str:
    """What a message adds to an unknown word: the closest known one, or nothing."""
    names = {name.casefold(): name for name in known}
    near = difflib.get_close_matches(word.casefold(), names, 1, 0.5)
    return f"; did you mean {names[near[0]]!r}?" if near else ""


def suggest(word: str, known: Iterable[str]) -> str:
    """The closest known one, and all of them."""
    return f"{nearest(word, known := list(known))} (valid: {', '.join(known) or 'none'})"


def one_line(text: object, longest: int = 300) -> str:
    """What a stranger's file may put on the terminal: one line, of printable characters, not too long.

    Of an error that says nothing, its class.
    """
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(str(text).split()))
    line = line or type(text).__name__ * isinstance(text, Exception)
    return line if len(line) <= longest else line[:longest] + "..."


def counted(count: int, what: str) -> str:
    """As in `1 image` and `2,000 images`."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def first_of(mistakes: Iterable[tuple[str, str]]) -> str:
    """(place, reason) of the first mistake, and in a second line some of the others, each place once."""
    reasons: dict[str, str] = {}
    for place, reason in mistakes:
        reasons.setdefault(place, reason)
    first, *others = [f"{place}{': ' * bool(place)}{one_line(reason, 500)}" for place, reason in reasons.items()]
    also = [one_line(text, 150) for text in others[:6]] + ["..."] * (len(others) > 6)
    return first + f"\nalso wrong: {'; '.join(also)}" * bool(also)


class DtlError(Exception):
    """The root; `exit_code` is what the shell sees."""

    exit_code = 1


@contextmanager
def named(what: str) -> Iterator[None]:
    """Within, an error says of what it is, and stays what it is."""
    try:
        yield
    except DtlError as error:
        error.args = (f"{what}: {error}",)
        raise


class RecipeError(DtlError):
    """The recipe or the call is wrong; nothing was loaded or trained."""

    exit_code = 2


@contextmanager
def refused(what: str) -> Iterator[None]:
    """Within, a ValueError is a mistake of the recipe or the call."""
    try:
        yield
    except ValueError as error:
        raise RecipeError(f"{what}: {one_line(error)}") from None


class DivergedError(DtlError):
    """Training met a loss, gradient or weight that is not finite; nothing was published."""

    exit_code = 3


class DataError(DtlError):
    """A dataset cannot be read as the recipe says."""

    exit_code = 4


class NoSplit(DataError):
    """A dataset lacks the split that is asked for; `usual` are those that it has and that are often called so."""

    def __init__(self, message: str, usual: Iterable[str] = ()):
        super().__init__(message)
        self.usual = list(usual)


class CheckpointError(DtlError):
    """A checkpoint is missing, damaged, stale, or cannot be written."""

    exit_code = 4


class EvidenceError(DtlError):
    """What was measured does not meet the limits of the recipe's table [publish]; everything is done and written."""

    exit_code = 5


class Stopped(DtlError):
    """A signal asked the run to end; finished results and the state of unfinished ones are kept."""

    def __init__(self, signum: int):
        super().__init__(
            "stopped by a signal; what is finished or saved is kept, and the same command goes on from there"
        )
        self.exit_code = 128 + signum
