"""The benchmark of training: every way is timed, and what is slow looks slow."""

from __future__ import annotations

import json
import time
from importlib.util import find_spec
from statistics import median

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import transforms as T

from dtlctl.bench import training
from dtlctl.bench.meter import Setup
from dtlctl.data.entry import Kept
from dtlctl.data.stream import Streamed
from dtlctl.model import networks

WITH_TIMM = find_spec("timm") is not None
with_timm = pytest.mark.skipif(not WITH_TIMM, reason="timm is not installed")
BATCH = 150  # of 1,000 images: the 7 steps of a way, 3 to warm up, go through more than one epoch
TINY = (
    *("bench", "--train", "--quiet", "--json", "--data", "builtin:digits", "--arch", "resnet8", "--stem", "small"),
    *("--image-size", 8, "--batch-size", BATCH, "--steps", 2, "--repeats", 2),
)


def measured(call, *options):
    code, out, err = call(*TINY, *options)
    assert code == 0, err
    document = json.loads(out)
    return document, {(row["way"], row["workers"]): row for row in document["rows"]}


@pytest.mark.parametrize(
    ("layout", "other"),
    [((), "channels-last"), pytest.param(("--channels-last",), "contiguous", marks=pytest.mark.slow)],
)
def test_the_document_has_every_way_with_its_speed_and_its_ratios(layout, other, call, monkeypatch):
    """The ratio to the plain scripts is to the faster one of them."""
    monkeypatch.setattr(training, "cores", lambda: 2)
    document, rows = measured(call, *layout)
    ours = ("ready", f"ready-{other}", "dtlctl", "stream", "decode")
    plain = [("plain", 0), ("plain", 1)]
    ways = [*((way, None) for way in ours), *plain, *((("timm", 0), ("timm", 1)) if WITH_TIMM else ())]
    assert list(rows) == ways
    fastest = min(rows[way]["seconds"] for way in plain)
    for row in rows.values():
        assert len(row["turns"]) == 2 and row["seconds"] == median(row["turns"]) > 0
        assert row["images_per_second"] == pytest.approx(BATCH / row["seconds"])
        assert row["to_ready"] == pytest.approx(rows["ready", None]["seconds"] / row["seconds"])
        assert row["to_plain"] == pytest.approx(fastest / row["seconds"])
    assert (document["data"], document["images"]) == ("builtin:digits", 1000)
    told = {"device", "threads", "cores", "torch", "precision", "batch_size", "image_size", "arch", "stem"}
    assert told <= document["machine"].keys() and document["machine"]["cores"] == 2
    shown = training.text(document).splitlines()
    assert [line.split()[0] for line in shown[3:-1]] == [way for way, _ in ways]
    slower = max(rows["ready", None]["seconds"], rows["decode", None]["seconds"])
    assert f" {100 * slower / rows['stream', None]['seconds']:.0f} % " in shown[-1]


@pytest.mark.parametrize(
    ("place", "name", "slow", "share"),
    [
        (Kept, "__getitem__", "dtlctl", 1),
        (Streamed, "_piece", "stream decode", 1),
        pytest.param(training, "_prepare", "plain", 1, marks=pytest.mark.slow),
        pytest.param(training.Encoded, "__getitem__", "timm", 1 / 16, marks=[with_timm, pytest.mark.slow]),
    ],
    ids=["dtlctl", "stream", "plain", "timm"],
)
def test_a_slow_way_to_the_images_shows(place, name, slow, share, call, monkeypatch):
    """Half a second more a batch is several times what a step of the tiny network takes; no other way has it.

    Of a stream three batches are late at the same time. share: of a batch, that is read at once.
    """
    fast = getattr(place, name)

    def late(*arguments):
        time.sleep(0.5 * share)
        return fast(*arguments)

    monkeypatch.setattr(training, "cores", lambda: 1)
    monkeypatch.setattr(place, name, late)
    _, rows = measured(call, "--batch-size", 16)
    slowest = min(rows.values(), key=lambda row: row["to_ready"])
    assert slowest["way"] in slow and slowest["to_ready"] < 0.5 and slowest["seconds"] > 0.5 / 3


@with_timm
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_timm_s_loader_has_the_images_at_their_size_and_makes_floats_where_it_is_said(device, monkeypatch):
    """On a GPU, which needs none to be asked: bytes, for its prefetcher; else as the plain script normalises."""
    rng = np.random.default_rng(0)
    files = [Image.fromarray(rng.integers(0, 256, (12, 20, 3), np.uint8)) for _ in range(6)]
    images = datasets.Dataset.from_dict({"image": files, "label": range(6)})
    images = images.cast_column("image", datasets.Image())
    monkeypatch.setattr("timm.data.loader.PrefetchLoader", lambda loader, **_: loader)
    transforms = [T.Resize(8), T.CenterCrop(8), T.ToTensor(), T.Normalize((0.5,) * 3, (0.25,) * 3)]
    setup = Setup("resnet8", "small", 8, 3, "float32", False, 1, True)
    loader = training._of_timm(images, setup, transforms, torch.device(device), {"num_workers": 0})
    x, y = (torch.cat(part) for part in zip(*loader, strict=True))
    expected = torch.stack([T.Compose(transforms)(image) for image in files])[y]
    torch.testing.assert_close(x if device == "cpu" else (x / 255 - 0.5) / 0.25, expected)
    assert x.dtype == (torch.float32 if device == "cpu" else torch.uint8) and sorted(y.tolist()) == list(range(6))


@pytest.mark.parametrize(("arch", "stem"), [("resnet18", "small"), ("resnet10", "imagenet"), ("resnet8", "small")])
def test_the_plain_network_is_the_same_one_with_torch_s_convolutions(arch, stem):
    setup = Setup(arch, stem, 32, 8, "float32", False, 1, True)
    theirs = training.plain_network(setup, 7)
    ours = networks.build(arch, {"source": 7}, stem=stem, image_size=32)
    assert sorted(p.shape for p in theirs.parameters()) == sorted(p.shape for p in ours.parameters())
    assert {type(m) for m in theirs.modules() if isinstance(m, nn.Conv2d)} == {nn.Conv2d}


@pytest.mark.parametrize(
    ("call_of", "message"),
    [
        ((*TINY, "--ways", "gc-keep"), "bench: --ways is for the benchmark of collisions; leave it or --train out"),
        ((*TINY, "--chunks", "2"), "bench: --chunks is for the benchmark of collisions; leave it or --train out"),
        ((*TINY, "--batch-size", 2000), "--batch-size 2000: builtin:digits has only 1000 training images"),
        ((*TINY, "--data", "builtin:digit"), "bench: --data: no builtin dataset 'digit'; did you mean 'digits'?"),
        ((*TINY, "--arch", "resnet9"), "bench: unknown architecture 'resnet9'"),
        (("bench", "--steps", 3), "bench: --steps is for training; add --train"),
        (("bench", "--data", "builtin:digits"), "bench: --data is for training; add --train"),
    ],
)
def test_wrong_calls_are_refused_in_one_line(call_of, message, call):
    code, out, err = call(*call_of)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1
