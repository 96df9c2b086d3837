"""Recipes that are wrong on purpose: (what, the file, arguments, exit codes that are right)."""

from __future__ import annotations

import random
from collections.abc import Iterator

from tests.conftest import TINY

Bad = tuple[str, bytes, tuple[str, ...], tuple[int, ...]]

NAMES = {
    "parent": "../x",
    "absolute": "/tmp/x",
    "dot": ".",
    "dots": "..",
    "hidden": ".x",
    "backslash": "a\\\\b",
    "NUL": "a\\u0000b",
    "newline": "a\\nb",
    "escape sequence": "\\u001b[31mred",
    "300 characters": "a" * 300,
    "empty": "",
    "space": "a b",
    "trailing dot": "a.",
    "Windows CON": "con",
    "Windows NUL with ending": "NUL.txt",
    "Windows COM1": "com1",
    "Windows LPT9": "LPT9",
    "Cyrillic look-alike": "\u0430bc",
    "full-width solidus": "a\uff0fb",
    "two-dot leader": "\u2025",
    "right-to-left override": "a\u202eb",
    "zero-width space": "a\u200bb",
    "home": "~root",
    "pattern": "*",
    "shell": "$(id)",
}

TEXTS: dict[str, bytes] = {
    "empty file": b"",
    "not UTF-8": b"name = '\xe9'",
    "NUL bytes": b"\0" * 100,
    "a picture": b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
    "a pickle": b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
    "5,000 brackets": b"x = " + b"[" * 5000,
    "3,000 braces": b"x = " + b"{a=" * 3000,
    "a number of 5,000 digits": b"seed = " + b"9" * 5000,
    "a key of 5,000 parts": b"x" + b".y" * 5000 + b" = 1",
    "two megabytes": b"# " + b"x" * 2_000_000,
    "a key with an escape sequence": b'"a\\n\\u001b[31m" = 1',
    "a key twice": b"name = 'a'\nname = 'b'",
    "a table twice": b"[data]\n[data]",
    "unfinished string": b'name = "x',
    "JSON": b'{"name": "x"}',
    "YAML": b"name: x\ndata:\n  source: !!python/object/apply:os.system ['id']\n",
    "Python": b"import os\nos.system('id')\n",
    "a date as a name": b"name = 1979-05-27",
    "a name that is a table": b"[name]\nx = 1",
    "data that is a number": b"name = 'x'\ndata = 3",
    "a list of tables": b"name = 'x'\n[[data]]\npath = 'x'",
}

CHANGES = {
    "not a number": "dispose.gc.lambda=nan",
    "infinity": "pretrain.lr=inf",
    "huge integer": "pretrain.steps=99999999999999999999999",
    "negative batch": "pretrain.batch_size=-1",
    "boolean as a number": "pretrain.lr=true",
    "unknown key": "pretrain.lrr=1",
    "unknown table": "pretrian.lr=1",
    "unknown kind": "dispose.gc.unlearn.kind=os.system",
    "kind that is a list": 'dispose.gc.unlearn.kind=["uniform"]',
    "kind that is a table": "dispose.gc.unlearn.kind={}",
    "architecture from a path": "model.arch=../../x",
    "architecture from a module": "model.arch=os:system",
    "a path with NUL": 'data.source.path="a\\u0000b"',
    "a path that is no hub id": "data.source.path=a/b/c",
    "an unknown builtin": "data.source.path=builtin:__init__",
    "an empty path": 'data.source.path=""',
    "config of a local path": 'data.source={path="/", config="x"}',
    "an empty split": 'data.source.train=""',
    "like itself": "data.piggyback.again.like=again",
    "like a list": "data.piggyback.again.like=[1]",
    "saving backwards in time": "checkpoint_minutes=-1",
    "saving never": "checkpoint_minutes=inf",
    "override without a value": "seed",
    "override without a key": "=1",
    "override with 5,000 brackets": "x=" + "[" * 5000,
    "override with an escape sequence": "x='\x1b[31m",
    "override through a number": "seed.x=1",
}


def all_of_them(rng: random.Random) -> Iterator[Bad]:
    for what, name in NAMES.items():
        yield f"name: {what}", TINY.replace('"tiny"', f'"{name}"').encode(), (), (2,)
    for what in ("parent", "absolute", "NUL", "300 characters", "Windows CON", "Cyrillic look-alike"):
        text = TINY.replace("[dispose.rand]", f'[dispose."{NAMES[what]}"]')
        yield f"variant: {what}", text.encode(), (), (2,)
        text = TINY.replace("[data.piggyback.again]", f'[data.piggyback."{NAMES[what]}"]')
        yield f"piggyback: {what}", text.encode(), (), (2,)
    for what, blob in TEXTS.items():
        yield f"file: {what}", blob, (), (2,)
    for what, change in CHANGES.items():
        yield f"--set: {what}", TINY.encode(), ("--set", change), (2,)
    for number in range(20):
        yield f"random damage {number}", damaged(rng), (), (0, 2)


def damaged(rng: random.Random) -> bytes:
    """The tiny recipe with a few bytes changed, removed or put in; it may still be one."""
    text = bytearray(TINY.encode())
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(text))
        what = rng.choice(("change", "remove", "insert"))
        if what == "change":
            text[place] = rng.randrange(256)
        elif what == "remove":
            del text[place : place + rng.randint(1, 20)]
        else:
            text[place:place] = rng.choice((b"[", b"]", b'"', b"=", b".", b"{", b"}", b"\n", b"-", b"9" * 30, b"\xff"))
    return bytes(text)
