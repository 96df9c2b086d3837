"""What `dtlctl init --source DIR --target DIR` prints: a recipe for somebody's data, that this machine can do."""

import io
import json
import math
import re
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from dtlctl.console import devices
from dtlctl.console.machine import busy, cores
from dtlctl.console.progress import say
from dtlctl.data import cache, files, subset
from dtlctl.data.dataset import Dataset, Rows, Split, dataset_at
from dtlctl.data.overlap import SAME
from dtlctl.data.sources import Source
from dtlctl.errors import CheckpointError, DataError, NoSplit, counted, one_line, refused
from dtlctl.model import networks
from dtlctl.model.weights import REGISTRY, Given, read, tensors_of
from dtlctl.recipe.loading import validated
from dtlctl.recipe.overrides import tomllib
from dtlctl.recipe.plan import jobs
from dtlctl.recipe.schema import Model, stream
from dtlctl.recipe.settings import PASSES, STEPS
from dtlctl.stages import audit, costs
from dtlctl.stages.costs import Clock
from dtlctl.stages.preview import rendered, words
from dtlctl.training.price import EXPECTED, resolution

MINUTES, PLANNED = 30, 0.6
"""What a run may take, and what training and attackers may of it by the quickest steps: real ones were seen to take a
quarter longer, and images to read and the audit come on top."""
HELD_OUT, SEED = 0.2, stream(0, "subset/source")
"""Of each class, for testing, where there is no test split; and by which seed, that of the recipe that is written."""
EPOCHS = 2
"""Of pre-training for each pass of the disposal over the source: it is the disposal that a short run starves, first of
target accuracy. What all recommended passes leave goes to pre-training."""
MOST = 40
"""Epochs of pre-training: more are left to whoever has the time."""
LEAST, SHORT = 4, 400
"""Passes of a disposal, and steps: with fewer, a new network does not reach TL. Recommended ones get half the time."""
BATCH = 64
ATTACK, WEAKEST = 150, 30
"""Steps that an attacker gets; fewer, but not fewer than so many, where all of them would take a third of the time."""
SIDES = (16, 24, 32, 48, 64, 96, 128, 160, 224)
KEPT, FEWEST = 0.8, 8
"""The share of the target that is trained on, and images of it that make the four chunks of the recommended loss."""
PRICE = 1.0
"""Points of Acc_t that the disposal may cost; [publish] allows besides what so many test images cannot tell from it."""
LOOKED = 48
"""Images of a dataset that are opened for their size."""
FIXED: dict[str, Any] = {"kept": KEPT, "usual": ATTACK, "recommended": PASSES, "audited": audit.LEAST, "price": PRICE}
FIXED["toml"] = partial(json.dumps, ensure_ascii=False)
"""What the template has whatever the data."""


def write(
    source: str, target: str, attacker: str | None, weights: str | None, arch: str | None, size: int | None,
    name: str | None, minutes: int = MINUTES, quiet: bool = True,
) -> str:  # fmt: skip
    """The recipe as TOML. Raises what the stages would for data and weights that they cannot use.

    arch: the network, as in a recipe; None for one that fits this machine, or for that of the weights. minutes: what
    the run may take here; where that starves the disposal, it is said.
    """
    if arch:  # what no data can make right is told before they are read
        with refused("init"):
            networks.check(arch, "small" if arch in networks.DEPTHS else "imagenet", None, size)
    seconds, crowded = 60 * PLANNED * minutes, costs.crowded()
    paths = {"source": source, "target": target, "piggyback.attacker": attacker}
    seen = {role: look(path, role) for role, path in paths.items() if path is not None}
    own, theirs, device = seen["source"], seen["target"], torch.device(devices.kind())
    counts = theirs["counts"]
    if not FEWEST <= sum(subset.sizes(counts, KEPT, "keep")) < sum(counts):
        raise DataError(
            f"data.target.path: {target}: {counted(sum(counts), 'training image')} of {len(counts)} classes are too "
            f"few: a step of the disposal takes {FEWEST} or more, and others are held back to measure the price"
        )
    gpu = device.type != "cpu"
    folders = "-".join(Path(path).name.removeprefix("builtin:") for path in (source, target))
    usual = re.sub(r"[^\w.-]+", "-", folders, flags=re.ASCII).strip("-._")[:64]
    each = max(4, min(20, min(own["counts"]) // 20))
    side, names = _side(max(own["side"], theirs["side"]), size, gpu), (own["classes"], theirs["classes"])
    network, stage, trained = adopted(weights, arch, side, *names, size is not None) if weights else ({}, "", None)
    told: dict[str, Any] = {
        **FIXED,
        "name": name or usual.rstrip(".") or "mine",
        "machine": f"{cores()} CPU cores, {devices.name(device) if gpu else 'no GPU'}",
        "each": min(each, *own["counts"]),
        "few": round(min(1.0, each * len(own["counts"]) / sum(own["counts"])), 6),
        "told": (told_to := resolution(max(1, theirs["tests"]), EXPECTED)),
        "most": float(max(2, math.ceil(PRICE + told_to))),
    }
    told |= {"source": own, "target": theirs, "attacker": seen.get("piggyback.attacker"), "limit": minutes, "gpu": gpu}
    told |= {"weights": weights, "adopted": stage, "trained": trained, "asked": arch is not None, "asked_size": size}
    fit = [network] if weights else _networks(side, arch, gpu, size is not None)
    for told["model"], told["two"] in product(fit, (True, False)):  # a second variant only where all of it has room
        told |= _able(told["model"])
        told |= {"minutes": "?", "fraction": 1.0, "epochs": 1, "steps": 1, "passes": 1.0, "attack": ATTACK}
        spent = _seconds(_render(told), {role: found["counts"] for role, found in seen.items()})
        # By the quickest steps, or a busy moment decides.
        epoch, step, attacks, rest = (float(spent[name][0]) for name in ("pretrain", "dispose", "piggyback", "rest"))
        told["attack"] = int(max(WEAKEST, min(ATTACK, ATTACK * seconds / 3 / (attacks or 1))))
        spent["rest"] += spent["piggyback"] * told["attack"] / ATTACK
        room = seconds - rest - attacks * told["attack"] / ATTACK
        told |= lengths(max(room, seconds / 4), sum(own["counts"]), epoch, step)
        whole = (told["fraction"], told["attack"]) == (1, ATTACK) and room >= seconds / 4
        if whole and told["steps"] >= SHORT * told["two"]:
            break
    total = told["epochs"] * told["fraction"] * spent["pretrain"] + told["steps"] * spent["dispose"] + spent["rest"]
    told["minutes"] = words(total / 60, "min") + (f" ({note})" if (note := crowded or busy()) else "")
    _say(told, total, note, quiet)
    return _render(told)


def _say(told: dict[str, Any], seconds: np.ndarray, note: str | None, quiet: bool) -> None:
    """What nobody should miss who writes the recipe into a file, unread; seconds: [2], of all of it."""
    if note:
        say(f"init: {note}; lengths in the recipe are by these times", quiet)
    steps, size, trained = told["steps"], told["model"]["image_size"], told["trained"]
    if len({Path(told[role]["table"]["path"]).resolve() for role in ("source", "target")}) == 1:
        say(f"init: data.target: {SAME}", quiet)
    if trained not in (None, size):
        say(f"init: the weights were trained at {trained} pixels; image_size is {size} (--size {trained})", quiet)
    if steps < SHORT:
        short = f"{steps:,} steps of disposal fit; with fewer than {SHORT} a new network may not get as far as TL"
        time, smaller = words((seconds / 60).tolist(), "min"), " or --arch" * (not told["weights"])
        say(f"init: {time} here; {short}: more --minutes, or a smaller --size{smaller}", quiet)


def lengths(room: float, images: int, epoch: float, step: float) -> dict[str, float]:
    """How many of the source's images, epochs of pre-training and steps of disposal fit; room, epoch, step: seconds."""
    fits = room / (EPOCHS * epoch + step * images / BATCH)
    fraction = min(1.0, float(f"{fits / LEAST:.2g}"))
    passes = min(PASSES, max(LEAST, fits))
    steps = max(1, int(passes * fraction * images / BATCH), min(STEPS, int(room / 2 / step)))
    left = (room - steps * step) / (fraction * epoch) if epoch else 0.0
    epochs = int(min(MOST, max(EPOCHS * LEAST, left)))
    used = fraction * images  # where they are fewer than a batch, a step has them all
    return {"fraction": fraction, "epochs": epochs, "steps": steps, "passes": steps * min(BATCH, used) / used}


def look(path: str, role: str) -> dict[str, Any]:
    """What the template says of the dataset at a path, by both splits and some of its images. Raises DataError.

    `counts`: training images of each class; `least`: test images of the class with fewest; `side`: median of the
    shorter sides; `table`: keys that say where it is.
    """
    try:
        dataset = dataset_at(path)
    except ValueError:
        raise DataError(f"data.{role}.path: {path} is no folder, no file, no hub id and nothing builtin") from None
    with tempfile.TemporaryDirectory() as folder:
        found: dict[Split, Rows] = {}
        for split in ("train", "test"):
            dataset, found[split] = _opened(dataset, split, role, Path(folder))
        if dataset.test != "test":  # then images of the train split, or what is said of it, are others
            found["train"] = Source(dataset, role, SEED).rows("train", SIDES[0], Path(folder))
        train, test = found["train"], found["test"]
        cache.check_classes(train, "train", f"data.{role}.path: {path}")
        chosen = np.flatnonzero(train.labels >= 0)
        chosen = chosen[np.linspace(0, len(chosen) - 1, min(LOOKED, len(chosen)), dtype=int)]
        pictures = [_picture(train, int(row), role) for row in chosen]
    sides, sizes = sorted(min(size) for size, _ in pictures), sorted({size for size, _ in pictures}, key=np.prod)
    return {
        "classes": train.classes,
        "counts": np.bincount(train.labels[train.labels >= 0], minlength=len(train.classes)).tolist(),
        "side": sides[len(sides) // 2],
        "tests": len(tested := test.labels[test.labels >= 0]),
        "least": min(np.unique(tested, return_counts=True)[1], default=0),
        "sizes": list(dict.fromkeys(f"{width}x{height}" for width, height in (sizes[0], sizes[-1]))),
        "modes": sorted({mode for _, mode in pictures}),
        "notes": [one_line(note.text) for rows in found.values() for note in rows.notes],
        "table": dataset.model_dump(include={"path", "train", "test", "augment"}, exclude_defaults=True),
    }


def _opened(dataset: Dataset, split: Split, role: str, scratch: Path) -> tuple[Dataset, Rows]:
    """A split, and the dataset with the name that this split has, or with a test split held out where it has none."""
    try:
        return dataset, Source(dataset, role, SEED).rows(split, SIDES[0], scratch)
    except NoSplit as error:
        if not error.usual and split == "train":
            raise
        dataset = dataset.model_copy(update={split: error.usual[0] if error.usual else HELD_OUT})
        return dataset, Source(dataset, role, SEED).rows(split, SIDES[0], scratch)


def _picture(rows: Rows, row: int, role: str) -> tuple[tuple[int, int], str]:
    """Width, height and mode of an image."""
    (found,) = rows.pictures([row])
    try:
        with Image.open(io.BytesIO(found)) if isinstance(found, bytes) else found as picture:
            return picture.size, picture.mode
    except Exception:  # PIL's plugins raise OSError, SyntaxError, ValueError, struct.error, ...
        reason = files.reason(found) if isinstance(found, bytes) else "it cannot be read"
        raise DataError(f"data.{role}.path: {rows.place(row)}: {reason}") from None


def _side(found: int, size: int | None, gpu: bool) -> int:
    """Of the images that the network gets; found: of those that there are."""
    return size or max(side for side in SIDES if side <= max(SIDES[0], min(found, 224 if gpu else 64)))


def _networks(side: int, arch: str | None, gpu: bool, fixed: bool) -> Iterator[dict[str, Any]]:
    """Keys of [model], from what one would like to what a slow machine can do; fixed: images are of that side."""
    if arch or gpu:
        found = arch or "resnet18"
        small = found in networks.DEPTHS or (found.startswith("resnet") and side <= 64)
        yield {"arch": found, "stem": "small" if small else "imagenet", "image_size": side}
        return
    for name, pixels in [("resnet20", side), ("resnet8", side), *[("resnet8", 32)] * (side > 32 and not fixed)]:
        yield {"arch": name, "stem": "small", "image_size": pixels}


def _able(model: dict[str, Any]) -> dict[str, Any]:
    """What a network cannot differentiate twice, whether its maps end small and it has batch norms. RecipeError."""
    spec = [{"width": None, **model}[key] for key in ("arch", "stem", "width", "image_size")]
    with refused("init"):
        networks.check(*spec)
    backbone = networks.outline(*spec).backbone
    normed = any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in backbone.modules())
    return {"lacking": networks.no_second_derivative(*spec), "small": Model(**model).ends_small, "normed": normed}


def adopted(
    weights: str, arch: str | None, side: int, source: Sequence[str], target: Sequence[str], fixed: bool
) -> tuple[dict[str, Any], str, int | None]:
    """Keys of [model] for the network that weights are of, the stage they replace, and the image size they are for.

    By `arch`, or what the file or the config.json of its folder says, or else of any ResNet that they fit.
    side: of the images, where nothing says what the network was trained on, or it is fixed: asked for. source, target:
    classes. Raises CheckpointError.
    """
    said = {} if weights.startswith(REGISTRY) else tensors_of(weights)[1]
    own = {key: said[key] for key in ("width", "mean", "std") if said.get(key)}
    told = arch or said.get("arch") or ("timm" in said and f"{networks.TIMM}{said['timm']}")
    archs = [told] if told else [*(f"resnet{depth}" for depth in (18, 34, 50, 101, 152, 10)), *networks.DEPTHS]
    stems = [said["stem"]] if "stem" in said else ["imagenet", "small"]
    trained, built = ([said[key]] if key in said else [] for key in ("image_size", "side"))
    sides = [side] if fixed else dict.fromkeys([*trained, side, *built, 224])
    failures: list[Exception] = []
    for stem, name, size in product(stems, archs, sides):
        keys = {"arch": name, "stem": stem, "image_size": size, **own}
        try:
            networks.check(name, stem, keys.get("width"), size)
            given = read(weights, {"width": None, "mean": networks.MEAN, "std": networks.STD, **keys})
        except (CheckpointError, ValueError, TypeError) as error:  # a header may hold anything
            failures.append(error)
        else:
            return keys, _replaced(weights, given, source, target), next(iter([*trained, *built]), None)
    fitted = [str(error) for error in failures if isinstance(error, CheckpointError)] or [*map(str, failures)]
    text = min(fitted, key=lambda text: "its head" not in text)  # then all else of that network fits
    hint = "\nwhere it is no ResNet, name it: --arch mobilenet_v3_small, --arch timm:NAME"
    more = hint * (not told and "do not fit" in text and "its head" not in text)
    raise CheckpointError(f"{weights}: {text.removeprefix(f'{weights}: ')}{more}")


def _replaced(weights: str, given: Given, source: Sequence[str], target: Sequence[str]) -> str:
    """The stage that the weights replace, by the size of their head or its names. CheckpointError for another."""
    outputs, names = len(given.head[1]) if given.head else 0, {*(given.classes or ())}
    if not names and outputs not in (0, len(source), len(target)):
        raise CheckpointError(
            f"{weights}: its head has {outputs} outputs without names; the source has {len(source)} classes, the "
            f"target {len(target)}: name them in a config.json beside it (label_names), or take the head out"
        )
    told = outputs != len(source) or names == {*target} != {*source}
    return "finetune" if outputs == len(target) and told else "pretrain"


def _render(told: dict[str, Any]) -> str:
    """The template with comments at one column. Raises RecipeError where it is no valid recipe."""
    text = rendered("starter.toml.j2", told)
    aligned = re.sub(r"^((?!path|weights)[^#\n]+)  # ", lambda found: f"{found[1]:<39} # ", text, flags=re.MULTILINE)
    with refused("init: a name or path cannot be written as TOML"):  # bytes that are no text, or a control character
        validated(tomllib.loads(aligned.encode().decode()), "init")
    return aligned + "\n"


def _seconds(text: str, counts: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """What these stages take here as the recipe has them, and all the "rest" but the audit: [2] seconds each."""
    recipe = validated(tomllib.loads(text), "init")
    clock, seconds = Clock(recipe), {stage: np.zeros(2) for stage in ("pretrain", "dispose", "piggyback", "rest")}
    for job in [job for job in jobs(recipe) if job.stage != "audit"]:
        dataset = recipe.data.of(job.dataset)
        of = counts.get(job.dataset, counts["source"])
        images = sum(subset.sizes(of, dataset.fraction, dataset.balance))
        seconds[job.stage if job.stage in seconds else "rest"] += costs.training(job, images, clock)
    return seconds
