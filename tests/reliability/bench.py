"""Where faults are tried: a finished run to compare with, copies of it to spoil, and the form of a verdict."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

from tests.conftest import TINY
from tests.reliability.fork import Outcome, call

JOBS = {
    "pre": ("pretrain", "pre", "pretrain/model"),
    "TGT": ("finetune", "TGT", "target-only/model"),
    "TL": ("finetune", "TL", "finetune/model"),
    "gc": ("dispose", "gc", "dispose/gc/model"),
    "rand": ("dispose", "rand", "dispose/rand/model"),
    "piggyback TL": ("piggyback", "TL", "piggyback/TL/again"),
    "audit pre": ("audit", "pre", "audit/pre"),
}
STEPS = {"pre": 12, "TGT": 4, "TL": 4, "gc": 6, "rand": 4, "piggyback TL": 3, "audit pre": 0}
Entry = dict[str, Any]


class Bench:
    """A folder with the tiny recipe and a finished run of it, `ref`, to which everything is compared."""

    def __init__(self, seed: int):
        self.folder, self.random, self.every = Path(tempfile.mkdtemp()), random.Random(seed), 1
        self.count = 0
        (self.folder / "tiny.toml").write_text(TINY)
        made = call("run", "tiny.toml", "--set", "name=ref", "--quiet", folder=self.folder)
        assert made.code == 0, made.err
        self.files = listing(self.run("ref"))

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def fresh(self, without: str = "") -> str:
        """A copy of the finished run, one result missing, under a name of its own."""
        self.count += 1
        name = f"run-{self.count}"
        shutil.copytree(self.run("ref"), self.run(name))
        for path in self.run(name).glob(f"{without}.*") if without else ():
            path.unlink()
        return name

    def call(self, job: str, name: str, *more: str, fault: str = "") -> Outcome:
        stage, model, _ = JOBS[job]
        change = ("--set", f"name={name}", "--quiet")
        return call(stage, "tiny.toml", "--only", model, *change, *more, folder=self.folder, fault=fault)

    def drawn(self, faults: list[Any]) -> list[Any]:
        """One in `every` of them, at random."""
        return faults if self.every == 1 else self.random.sample(faults, -(-len(faults) // self.every))


def listing(run: Path) -> list[str]:
    return sorted(str(p.relative_to(run)) for p in run.rglob("*") if not p.is_dir() and "report" not in p.parts)


def result(run: Path, stem: str) -> str:
    """What a result is, but for times: a hash of the weights, or of the numbers."""
    if (weights := run / f"{stem}.safetensors").exists():
        return hashlib.sha256(weights.read_bytes()).hexdigest()
    document = json.loads((run / f"{stem}.json").read_text())
    numbers = {name: value for name, value in document["metrics"].items() if name != "cost"}
    return hashlib.sha256(json.dumps([numbers, document["history"]]).encode()).hexdigest()


def state_of(folder: Path) -> str:
    """ "none", "whole SHA" or "mixed" for the checkpoint of a folder as a reader finds it."""
    weights, sidecar = folder / "model.safetensors", folder / "model.json"
    if not weights.exists() or not sidecar.exists():
        return "none"
    said = json.loads(sidecar.read_text())["weights_sha256"]
    return f"whole {said}" if hashlib.sha256(weights.read_bytes()).hexdigest() == said else "mixed"


def entry(group: str, fault: str, expected: str, outcomes: list[Outcome], problems: list[str]) -> Entry:
    """The verdict on one fault; `problems` are what a reader of the results would find wrong."""
    traces = any("Traceback" in o.err for o in outcomes)
    hang = any(o.hung for o in outcomes)
    happened = ", then ".join(f"exit {o.code}" for o in outcomes) + "".join(f"; {p}" for p in problems)
    lost, mixed = any("lost" in p for p in problems), any("mixed" in p for p in problems)
    wrong = traces or hang or bool(problems)
    if wrong:
        happened += "; " + " | ".join(o.err.strip()[-300:] for o in outcomes)
    return {
        "group": group,
        "fault": fault,
        "expected": expected,
        "happened": happened,
        "ok": not wrong,
        "lost": lost,
        "mixed": mixed,
        "traceback": traces,
        "hang": hang,
    }
