"""The command line: all commands, and how an error becomes two lines and an exit code."""

import io
import os
import re
import sys
from contextlib import nullcontext, redirect_stdout
from typing import Annotated

import typer

from dtlctl import __version__
from dtlctl.cli import commands, tools
from dtlctl.console import stop
from dtlctl.errors import DtlError, RecipeError, Stopped

HELP = """Disposable transfer learning: pre-train on private data, fine-tune on a small task, dispose of the rest.

One TOML recipe describes an experiment. `dtlctl run RECIPE` does all of it: pretrain, finetune, dispose, piggyback,
audit, report. Every stage is a command of its own, skips what is up to date, and runs unchanged on many processes:
torchrun --nproc_per_node N -m dtlctl run RECIPE.

Exit codes: 0 done; 1 memory ran out or a process is gone; 2 the recipe or the call is wrong; 3 training diverged; 4
data or checkpoint unusable; 5 what was measured misses the limits of the recipe's table publish; 130
or 143 stopped by a signal.
"""

app = typer.Typer(
    help="\n\n".join(" ".join(paragraph.split()) for paragraph in HELP.split("\n\n")),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _top(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with an error.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit
    os.environ["DTLCTL_DEBUG"] = "1" if debug else os.environ.get("DTLCTL_DEBUG", "")


app.command()(tools.init)
app.command()(commands.run)
for name, summary in commands.STAGES.items():
    app.command(name, help=summary)(commands.stage(name))
for command in (commands.check, commands.report, commands.export, commands.verify, commands.sweep, commands.compare,
                tools.schema, tools.bench):  # fmt: skip
    app.command()(command)


def main() -> None:
    """Run the command line; every foreseen failure becomes one or two lines on stderr and an exit code."""
    stop.listen()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a table with "?" for what the terminal lacks, such as "λ"
    rank = os.environ.get("RANK", "0")
    try:
        with nullcontext() if rank == "0" else redirect_stdout(io.StringIO()):  # the main process prints for all
            app(prog_name="dtlctl")
    except Exception as error:
        foreseen = _foreseen(error)
        if foreseen is None or os.environ.get("DTLCTL_DEBUG"):
            raise
        where = f"[process {rank}] " if rank != "0" else ""
        print(f"{where}error: {foreseen}", file=sys.stderr)
        sys.exit(foreseen.exit_code)
    finally:
        stop.finish()


def _foreseen(error: Exception) -> DtlError | None:
    """The error as a user should see it; None for one that nobody has foreseen."""
    if isinstance(error, DtlError):
        return error
    if isinstance(error, ModuleNotFoundError) and error.name in ("fcntl", "resource"):
        return RecipeError("dtlctl runs on Linux and macOS; on Windows start it in WSL")
    if isinstance(error, RuntimeError):
        from dtlctl.training.failures import is_loss

        if is_loss(error):
            gone = "another process of this run is gone; its own message, or the launcher's, says why\n"
            gone += "the same command goes on from the state that was saved last"
            return Stopped(stop.pending()) if stop.pending() else DtlError(gone)
    if lacking := re.search(r"'(aten::[\w.]+)' (?:is not .*for the|with arguments from the) '?(\w+)", str(error)):
        return RecipeError(
            f"{lacking[2]}: torch has no {lacking[1]} for this device\n"
            "set ACCELERATE_USE_CPU=1 to run on the CPU, or, on Apple's GPUs, PYTORCH_ENABLE_MPS_FALLBACK=1 to do this "
            "operation alone there"
        )
    return None
