"""What a run's folder says was measured: its sidecars, and the numbers in them by model."""

import json
import math
from base64 import b64decode
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from dtlctl.data.subset import sizes
from dtlctl.errors import CheckpointError
from dtlctl.recipe.plan import Job, jobs
from dtlctl.recipe.schema import Recipe
from dtlctl.storage import checkpoint

Row = dict[str, Any]
"""The numbers of one model by name; those of ATTACKS by name and piggyback dataset."""
ATTACKS = {"piggyback": "acc_pl", "piggyback_worst": "acc_pl_worst", "piggyback_max": "acc_pl_max"}
"""The sidecar's metric behind each kind of Acc_pl: of the one setting, the tuned attacker, the best by test images."""

BUDGETS = [digit * 10**power for power in range(6) for digit in (1, 2, 5)]
"""Numbers of trials after which an attacker's strength is told, besides all that he made."""

NEVER_SAW_THE_SOURCE = ("scratch", "TGT")
"""Nothing of the source can be recovered from these: what an attacker gets is what he learned himself."""


class Result(NamedTuple):
    """One sidecar of a run, and the job that it is of."""

    job: Job[Any]
    path: Path
    sidecar: Row


def recipe_of(run: Path) -> Recipe:
    """The run's recipe, every setting. Raises CheckpointError where there is none."""
    try:
        document = json.loads((run / "recipe.json").read_text(encoding="utf-8"))
        return Recipe.model_validate(document, context={"finished": True})
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise CheckpointError(f"{run / 'recipe.json'}: not a run's recipe ({reason})") from None


def results_of(run: Path, recipe: Recipe) -> list[Result]:
    """The recipe's results that are there, in order; what was made from other settings, images or weights is left out.
    Raises CheckpointError for a file that is no sidecar."""
    found: list[Result] = []
    weights: dict[str, str | None] = {}
    for job in jobs(recipe):
        path = run / job.path
        if (sidecar := checkpoint.read_sidecar(path)) is None:
            continue
        expected = {**job.described(recipe), "parent": {job.parent: weights.get(job.parent)} if job.parent else {}}
        with reading(path, f"data of {job.stage}"):
            if expected.items() <= sidecar.items() and not _differs(sidecar, job, recipe):
                weights.setdefault(job.model, sidecar.get("weights_sha256"))
                found.append(Result(job, path, sidecar))
    return found


def rows_of(results: Iterable[Result], recipe: Recipe) -> dict[str, Row]:
    """The numbers of a run's results by model, the references first. Raises CheckpointError where one lacks them."""
    rows: dict[str, Row] = {model: {"model": model, "piggyback": {}} for model in [*recipe.references, *recipe.dispose]}
    for job, path, sidecar in results:
        row, metrics = rows[job.model], sidecar["metrics"]
        with reading(path, f"metrics of {job.stage}"):
            if job.stage == "audit":
                # Through a head that nothing has trained an attack sees noise: its 0.5 would read as forgetting.
                if metrics["source_head"] == "trained" and "loss" in metrics:
                    row["audit_auc"] = float(metrics["loss"]["auc"])
            elif job.stage == "piggyback":
                for what, value in _attack(job, sidecar).items():
                    row.setdefault(what, {})[job.dataset.partition(".")[2]] = value
            else:
                row.update({name: float(value) for name, value in metrics.items() if name not in ("correct", "draws")})
                if job.stage == "dispose":
                    trained = sidecar["history"][-1]["step"] * sidecar["batch"]["source"]
                    row["passes"] = trained / sidecar["data"]["source"]["images"]
                    row["draws"] = len(metrics.get("draws", ())) or 1
                if answers := metrics.get("correct", {}).get("acc_t"):
                    row["answers"] = unpacked(answers, sidecar["data"]["target"]["test_images"])
    return {model: row for model, row in rows.items() if row["piggyback"] or row.keys() > {"model", "piggyback"}}


def unpacked(answers: str, images: int) -> np.ndarray:
    """bool [images]: which of them a model answers rightly, from what a sidecar keeps of it."""
    return np.unpackbits(np.frombuffer(b64decode(answers), np.uint8), count=images).astype(bool)


def _attack(job: Job[Any], sidecar: Row) -> Row:
    """What one attack puts into its model's row: under the names of ATTACKS accuracies in %; the rest is about them."""
    metrics, images = sidecar["metrics"], sidecar["data"].get(job.dataset, {}).get("test_images")
    chosen, half = metrics.get("chosen") or (), job.settings.choose_on == "test"
    given = [kind for kind, metric in ATTACKS.items() if metric in metrics or kind == "piggyback" or chosen]
    found: Row = {kind: float(metrics[ATTACKS[kind]]) for kind in given}
    if not all(0 <= percent <= 100 for percent in found.values()):
        raise ValueError("an accuracy is a share of images")
    found["diverged"] = metrics.get("chosen") == []
    # With nobody chosen, the one setting stands for the tuned ones.
    judges = metrics.get("judges", images // 2 if images and half else images) if chosen else images
    found["judged"] = {kind: images if kind == "piggyback" else judges for kind in ATTACKS}
    found["repeats"] = [one["acc_pl"] for one in chosen if "acc_pl" in one]
    found["curves"] = [[look["step"], look["acc_pl"]] for look in sidecar["history"] if "acc_pl" in look]
    if chosen:
        found["tuned_by"] = [" at ".join(filter(None, map(one.get, ("kind", "stage")))) for one in chosen]
    if chosen and not half:
        found["held_out"] = fmean(one["val"] for one in chosen)
    if trials := metrics.get("trials"):
        found["strength"] = strength(trials, in_order=job.settings.search is not None)
    return found | ({"winner": metrics["winner"]} if "winner" in metrics else {})


def strength(trials: Sequence[Row], *, in_order: bool) -> list[list[float]]:
    """[[k, %], ...]: how well the best of k trials does on the images that choose, for `BUDGETS` and for all trials.

    Of a search these are the first k. A grid has no order: then it is the mean over all ways to take k of n, of which
    the i-th from below is the best in C(i-1, k-1). A repetition is a budget of its own, and the mean is over them.
    """
    seeds: dict[int, list[float]] = {}
    for one in trials:
        seeds.setdefault(one["seed"], []).append(one["val"] or 0.0)  # null: it diverged
    n = min(map(len, seeds.values()))

    def best(found: list[float], k: int) -> float:
        if in_order:
            return max(found[:k])
        ways = [math.comb(i, k - 1) for i in range(len(found))]
        return sum(value * way / math.comb(len(found), k) for value, way in zip(sorted(found), ways, strict=True))

    return [[k, fmean(best(found, k) for found in seeds.values())] for k in sorted({*BUDGETS, n}) if k <= n]


def refuse_other_images(results: Iterable[Result], *, one_seed: bool) -> None:
    """Raise CheckpointError unless these results have seen the same images: which the recipe means nobody knows without
    the data. one_seed: also the same subset, and the same test split where that is a share held out by the seed."""
    seen: dict[tuple[str, str], tuple[Any, Path]] = {}
    for job, path, sidecar in results:
        with reading(path, f"data of {job.stage}"):
            parts = [(role, name, value) for role, own in sidecar["data"].items() for name, value in own.items()]
            drawn = {role for role, own in sidecar["datasets"].items() if not isinstance(own["table"]["test"], str)}
        for role, name, value in parts:
            other, first = seen.setdefault((role, name), (value, path))
            if other != value and (one_seed or (name in ("train", "test") and role not in drawn)):
                reason = f"made from other images of data.{role} than {first}"
                raise CheckpointError(f"{path}: {reason}; do the stages again: dtlctl run RECIPE")


def _differs(sidecar: Row, job: Job[Any], recipe: Recipe) -> bool:
    """Whether a result was certainly made from other images than the recipe says, or with other augmentation.

    Certainly: its key knows the images by content, which nobody has who only reads sidecars; see `renamed`.
    """
    for role in job.roles:
        was, now = sidecar["datasets"][role], recipe.data.of(role)
        then, counts = was["table"], was["class_images"]
        before = sizes(counts, then["fraction"], then["balance"])
        if then["augment"] != now.augment or before != sizes(counts, now.fraction, now.balance):
            return True
    return False


def renamed(results: Iterable[Result], recipe: Recipe) -> list[str]:
    """A sentence for every dataset that some results call otherwise than the recipe does: it may be the same one."""
    models: dict[tuple[str, str], dict[str, None]] = {}
    for job, _, sidecar in results:
        for role in job.roles:
            was, now = sidecar["datasets"][role]["table"], recipe.data.of(role).model_dump(mode="json")
            names = sorted(now.keys() - {"fraction", "balance", "augment", "decode"})
            if changed := [key for key in names if now[key] != was.get(key)]:
                before, after = (
                    ", ".join(f"{key} = {json.dumps(one.get(key), ensure_ascii=False)}" for key in changed)
                    for one in (was, now)
                )
                text = f"made with {before}; the recipe has {after}. What saw other images is made again by"
                models.setdefault((role, f"{text} dtlctl run RECIPE."), {})[job.model] = None
    return [f"data.{role} for {', '.join(some)}: {text}" for (role, text), some in models.items()]


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Whatever a sidecar of another form makes Python raise becomes a CheckpointError."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        raise CheckpointError(f"{path}: not the {what}; delete it") from None
