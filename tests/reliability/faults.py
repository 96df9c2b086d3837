"""Inject faults, run the same command again, and say what became of the results.

    python -m tests.reliability.faults --json docs/results/reliability/faults.json

Every fault is one entry {"group", "fault", "expected", "happened", "ok", "lost", "mixed", "traceback", "hang"}:
`lost` a checkpoint or a state that was there and is gone, or a result that differs from the undisturbed one; `mixed`
weights beside the sidecar of others. `--group NAME` does one group, `--group NAME:N` one in N of its faults, drawn
with `--seed`.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tests.reliability import bad_files, bad_recipes
from tests.reliability.bench import JOBS, STEPS, Bench, Entry, entry, listing, result, state_of
from tests.reliability.fork import Outcome, call, warm_up


def kills(bench: Bench) -> Iterator[Entry]:
    """kill -9 at a random step, in an evaluation, while state is saved, twice in one epoch: then the same command."""
    moments = []
    for job, steps in STEPS.items():
        draw = bench.random.randint
        moments += [(job, ["eval:1"]), (job, ["publish:1"]), (job, [f"publish:{draw(2, 8)}"])]
        if steps:
            moments += [(job, [f"step:{draw(1, steps)}"]) for _ in range(2)]
            moments += [(job, [f"step:{draw(2, steps)}", "step:2"]), (job, ["eval:2"])]
            moments += [(job, [f"save:{5 * draw(0, steps - 1) + boundary}"]) for boundary in range(1, 6)]
    for job, faults in bench.drawn(moments):
        stem = JOBS[job][2]
        name = bench.fresh(without=stem)
        often = ("--set", "checkpoint_minutes=0")
        outcomes = [bench.call(job, name, *often, fault=f"{fault}=kill") for fault in faults]
        outcomes.append(bench.call(job, name))
        problems = [f"{o.code} where a kill was due" for o in outcomes[:1] if o.code != -9]
        yield entry(
            "kill", f"{job}: {', '.join(faults)}", "same result", outcomes, problems + compare(bench, name, stem)
        )


def compare(bench: Bench, name: str, stem: str) -> list[str]:
    """What differs from the undisturbed run."""
    problems = []
    if listing(bench.run(name)) != bench.files:
        problems.append(f"other files: {set(listing(bench.run(name))) ^ set(bench.files)}")
    if not (bench.run(name) / f"{stem}.json").exists():
        problems.append("lost: no result")
    elif result(bench.run(name), stem) != result(bench.run("ref"), stem):
        problems.append("lost: another result")
    return problems


def publishing(bench: Bench) -> Iterator[Entry]:
    """kill -9 before and after every write boundary of a publication over an old checkpoint."""
    change = ("--set", "pretrain.lr=0.05")
    name = bench.fresh()
    assert bench.call("pre", name, *change).code == 0
    new, old = state_of(bench.run(name) / "pretrain"), state_of(bench.run("ref") / "pretrain")
    for where in bench.drawn([f"{kind}:{number}" for kind in ("publish", "rename") for number in range(1, 31)]):
        name = bench.fresh()
        folder = bench.run(name) / "pretrain"
        killed = bench.call("pre", name, *change, fault=f"{where}=kill")
        if killed.code == 0:
            continue  # there are not that many boundaries
        # Any command puts the folder in order; this one has nothing to do with the checkpoint.
        tidied = bench.call("TGT", name, *change)
        found = state_of(folder)
        problems = [] if found in (old, new) else [f"{found}: mixed or lost"]
        again = bench.call("pre", name, *change)
        problems += [] if state_of(folder) == new else ["lost: not made again"]
        problems += [] if listing(folder) == ["model.json", "model.safetensors"] else [f"left: {listing(folder)}"]
        what = "old" if found == old else "new"
        made = entry("publish", f"pre: {where}", "old or new checkpoint", [killed, tidied, again], problems)
        yield {**made, "happened": f"{made['happened']}; {what}"}


def signals(bench: Bench) -> Iterator[Entry]:
    """SIGTERM and SIGINT: exit 143 or 130, state saved, and the same command ends with the same result."""
    faults = []
    for job, steps in STEPS.items():
        trained = "eval:3" if job in ("gc", "rand") else "eval:1"  # a disposal looks at TL twice before it begins
        places = [trained, "publish:2"] + ([f"step:{bench.random.randint(1, steps)}"] if steps else [])
        faults += [(job, where, what) for where in places for what in ("term", "int")]
    for job, where, what in bench.drawn(faults):
        stem = JOBS[job][2]
        name = bench.fresh(without=stem)
        stopped = bench.call(job, name, fault=f"{where}={what}")
        state = (bench.run(name) / f"{stem}.resume" / "state.safetensors").exists()
        problems = [] if stopped.code == {"term": 143, "int": 130}[what] else [f"exit {stopped.code}"]
        if STEPS[job] and not where.startswith("publish") and not state:
            problems.append("lost: no state")
        again = bench.call(job, name)
        problems += compare(bench, name, stem)
        yield entry("signal", f"{job}: {where} {what}", "143 or 130, same result", [stopped, again], problems)


def disk_full(bench: Bench) -> Iterator[Entry]:
    """The disk is full at a write boundary: exit 4, the old checkpoint intact, the same result once there is room."""
    faults = [("pre", f"{kind}:{number}") for kind in ("save", "publish") for number in range(1, 9)]
    faults += [(job, f"publish:{n}") for job in ("gc", "piggyback TL", "audit pre") for n in (1, 2, 3)]
    change = ("--set", "pretrain.lr=0.05", "--set", "checkpoint_minutes=0")
    for job, where in bench.drawn(faults):
        stem = JOBS[job][2]
        more = change if job == "pre" else ()
        name = bench.fresh(without="" if job == "pre" else stem)
        folder, old = (bench.run(name) / stem).parent, state_of(bench.run("ref") / "pretrain")
        full = bench.call(job, name, *more, fault=f"{where}=full")
        problems = [] if full.code in (0, 4) else [f"exit {full.code}"]
        if full.code == 4 and ("No space left" not in full.err or full.err.count("\n") > 2):
            problems.append("unclear error")
        if full.code == 4 and job == "pre" and state_of(folder) != old and where.startswith("save"):
            problems.append("lost: old checkpoint")
        again = bench.call(job, name, *more)
        problems += [f"again: exit {again.code}"] if again.code else []
        problems += ["mixed"] if job in ("pre", "gc") and not state_of(folder).startswith("whole") else []
        problems += compare(bench, name, stem) if job != "pre" else []
        yield entry("disk full", f"{job}: {where}", "exit 4, old intact, then done", [full, again], problems)


def files(bench: Bench) -> Iterator[Entry]:
    """Damaged or hostile images, tables, checkpoints, sidecars and states."""
    every = [*bad_files.datasets(bench), *bad_files.checkpoints(bench), *bad_files.states(bench)]
    for name, prepare, code in bench.drawn(every):
        outcome = prepare()
        problems = [] if outcome.code in code else [f"exit {outcome.code}"]
        problems += errors_are_short(outcome)
        yield entry("file", name, " or ".join(f"exit {c}" for c in code), [outcome], problems)


def recipes(bench: Bench) -> Iterator[Entry]:
    """Broken and hostile recipes and names."""
    path = bench.folder / "bad.toml"
    for name, text, arguments, code in bench.drawn(list(bad_recipes.all_of_them(bench.random))):
        path.write_bytes(text)
        outcome = call("check", "bad.toml", *arguments, folder=bench.folder)
        problems = [] if outcome.code in code else [f"exit {outcome.code}"]
        problems += errors_are_short(outcome)
        yield entry("recipe", name, " or ".join(f"exit {c}" for c in code), [outcome], problems)


def errors_are_short(outcome: Outcome) -> list[str]:
    lines = [line for line in outcome.err.splitlines() if not line.startswith(("dtlctl ", "decode "))]
    if outcome.code and (len(lines) > 2 or any(len(line) > 1000 for line in lines)):
        return [f"an error of {len(lines)} lines, {len(outcome.err)} characters"]
    return []


def processes(bench: Bench) -> Iterator[Entry]:
    """Two processes, the fault in one of them; all end within 30 s, and go on to what two undisturbed ones make."""

    def launch(name: str, fault: str) -> tuple[Outcome, float]:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
        command = [*launcher, "-m", "tests.reliability.driver", fault, "pretrain", str(bench.folder / "tiny.toml")]
        options = ["--out", str(bench.folder / "runs"), "--set", f"name={name}", "--set", "checkpoint_minutes=0"]
        log = bench.folder / f"{name}.log"
        started = time.monotonic()
        with open(log, "w") as file:
            root = Path(__file__).parents[2]
            process = subprocess.Popen([*command, *options], cwd=root, stdout=file, stderr=subprocess.STDOUT)
            hung, fell = False, 0.0
            while process.poll() is None:
                time.sleep(0.05)
                fell = fell or (time.monotonic() if "FAULT" in log.read_text() else 0.0)
                if time.monotonic() - started > 300 or (fell and time.monotonic() - fell > 40):
                    hung = True
                    process.terminate()
                    process.wait(60)
        ended = time.monotonic()
        outcome = Outcome(process.returncode, "", log.read_text(), hung, ended - started)
        return outcome, ended - fell if fell else 0.0

    bench.count += 1
    base, _ = launch(f"two-{bench.count}", "none:1=kill")
    assert base.code == 0, base.err
    truth = result(bench.run(f"two-{bench.count}"), "pretrain/model")
    faults = {
        "step:5=kill@1": "-9",
        "step:7=term@1": "143",
        "eval:1=term@1": "143",
        "step:4=raise@1": "1",
        "save:12=full@0": "4",
        "start:1=term@1": "143",
    }
    for fault, code in bench.drawn(list(faults.items())):
        bench.count += 1
        name = f"two-{bench.count}"
        first, seconds = launch(name, fault)
        codes = sorted({part.split()[0] for part in first.err.split("exitcode  : ")[1:]})
        problems = [] if code in codes else [f"exit codes {codes}"]
        problems += [f"{seconds:.0f} s until all had ended"] if seconds > 30 else []
        again, _ = launch(name, "none:1=kill")
        same = again.code == 0 and result(bench.run(name), "pretrain/model") == truth
        problems += [] if same else ["lost: another result"]
        # What nobody foresaw may show its traceback, in the process that met it; so may the launcher.
        seen = first._replace(err=first.err if "raise" not in fault else "")
        seen = seen._replace(err="\n".join(line for line in own_lines(seen.err)))
        made = entry("processes", fault, f"exit {code} within 30 s, same result", [seen, again], problems)
        yield {**made, "happened": f"{made['happened']}; process exits {', '.join(codes)} after {seconds:.1f} s"}


def own_lines(text: str) -> list[str]:
    """What our processes said: torchrun ends with a traceback of its own whenever a process ends with a code."""
    marker = text.find("torch/distributed/run.py")
    head = text if marker < 0 else text[: text.rfind("Traceback", 0, marker)]
    return head.splitlines()


def keep(path: Path, seed: int, entries: list[Entry]) -> None:
    """Everything so far, as JSON."""
    import torch

    about = {
        "command": " ".join(["python -m tests.reliability.faults", *sys.argv[1:]]),
        "seed": seed,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": "cpu",
        "faults": entries,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n")


GROUPS: dict[str, Callable[[Bench], Iterator[Entry]]] = {
    "kills": kills,
    "publishing": publishing,
    "signals": signals,
    "disk": disk_full,
    "files": files,
    "recipes": recipes,
    "processes": processes,
}


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group", metavar="|".join(GROUPS), action="append")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(words)
    warm_up()
    bench = Bench(options.seed)
    entries: list[Entry] = []
    started = time.monotonic()
    try:
        for wanted in options.group or GROUPS:
            group, _, every = wanted.partition(":")
            bench.every = int(every or 1)
            for made in GROUPS[group](bench):
                entries.append(made)
                print(("ok   " if made["ok"] else "WRONG"), made["group"], made["fault"], made["happened"], flush=True)
                if options.json:
                    keep(options.json, options.seed, entries)
    finally:
        shutil.rmtree(bench.folder)
    bad = [e for e in entries if not e["ok"]]
    print(f"{len(entries)} faults, {len(bad)} not as promised, {time.monotonic() - started:.0f} s")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
