"""The benchmark of training: every way is timed, and what is slow looks slow."""

from __future__ import annotations

import json
import time
from statistics import median

import pytest
from torch import nn

from dtlctl.bench import training
from dtlctl.bench.meter import Setup
from dtlctl.data.entry import Kept
from dtlctl.data.stream import Streamed
from dtlctl.model import networks

BATCH = 300  # of about 1,000 images: turns go through more than one epoch
TINY = (
    *("bench", "--train", "--quiet", "--json", "--data", "builtin:digits", "--arch", "resnet8", "--stem", "small"),
    *("--image-size", 8, "--batch-size", BATCH, "--steps", 2, "--repeats", 2),
)


def measured(call, *options):
    code, out, err = call(*TINY, *options)
    assert code == 0, err
    document = json.loads(out)
    return document, {(row["way"], row["workers"]): row for row in document["rows"]}


@pytest.mark.parametrize(("layout", "other"), [((), "channels-last"), (("--channels-last",), "contiguous")])
def test_the_document_has_every_way_with_its_speed_and_its_ratios(layout, other, call, monkeypatch):
    """The ratio to the plain scripts is to the faster one of them."""
    monkeypatch.setattr(training, "cores", lambda: 2)
    document, rows = measured(call, *layout)
    ours = ("ready", f"ready-{other}", "dtlctl", "stream", "decode")
    ways = [*((way, None) for way in ours), ("plain", 0), ("plain", 1)]
    assert list(rows) == ways
    fastest = min(rows[way]["seconds"] for way in ways[-2:])
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
    ("place", "name", "slow"),
    [
        (Kept, "__getitem__", "dtlctl"),
        (Streamed, "_piece", "stream decode"),
        (training, "_prepare", "plain"),
    ],
    ids=["dtlctl", "stream", "plain"],
)
def test_a_slow_way_to_the_images_shows(place, name, slow, call, monkeypatch):
    """Half a second more a batch is several times what a step of the tiny network takes; no other way has it.

    Of a stream three batches are late at the same time.
    """
    fast = getattr(place, name)

    def late(*arguments):
        time.sleep(0.5)
        return fast(*arguments)

    monkeypatch.setattr(training, "cores", lambda: 1)
    monkeypatch.setattr(place, name, late)
    _, rows = measured(call, "--batch-size", 16)
    slowest = min(rows.values(), key=lambda row: row["to_ready"])
    assert slowest["way"] in slow and slowest["to_ready"] < 0.5 and slowest["seconds"] > 0.5 / 3


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
