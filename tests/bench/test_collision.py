"""The benchmark of gradient collision: all ways compute the same, and it says what it measured."""

from __future__ import annotations

import json

import pytest
import torch

from dtlctl.bench import meter
from dtlctl.bench.collision import WAYS, Bench

SMALL = (
    "--arch",
    "resnet8",
    "--stem",
    "small",
    "--image-size",
    "8",
    "--batch-size",
    "8",
    "--repeats",
    "1",
    "--chunks",
    "2",
)


def test_the_document_has_every_way_with_its_ratio_and_its_error(call):
    code, out, err = call("bench", *SMALL, "--chunks", "2,4", "--json", "--quiet")
    assert code == 0, err
    document = json.loads(out)
    rows = {(row["way"], row["chunks"]): row for row in document["rows"]}
    assert rows.keys() == {("ce", 1)} | {(way, c) for way in WAYS for c in (2, 4)}
    assert rows["ce", 1]["ratio"] == 1
    for (way, _), row in rows.items():
        assert row["ratio"] == pytest.approx(row["seconds"] / rows["ce", 1]["seconds"])
        if way.startswith("gc"):
            assert 0 < row["error"] < 1e-4 and row["cosine"] > 0.99999
        else:
            assert row["error"] is None
    assert document["machine"]["precision"] == "float32" and document["machine"]["batch_size"] == 8


def test_the_error_is_that_of_the_gradient():
    """|1.1 r - r| / |r| = 0.1, at a cosine of 1; of -r: 2, at -1."""
    subject = Bench(meter.Setup("resnet8", "small", 8, 8, "float32", False, 1, True), torch.device("cpu"))
    reference = subject.reference(2)
    for factor, error, cosine in ((1.1, 0.1, 1), (-1.0, 2, -1)):
        for parameter, r in zip(subject.parameters, reference, strict=True):
            parameter.grad = (factor * r).float()
        assert subject.error(reference) == (pytest.approx(error, rel=1e-5), pytest.approx(cosine, rel=1e-5))


def test_a_step_s_peak_counts_what_it_allocates_and_frees():
    """64 MiB of float32, filled and dropped: about that much is seen, where the system tells at all."""
    peak = meter.peak(lambda: torch.ones(2**24).sum(), torch.device("cpu"))
    assert peak is None or 60 * 2**20 <= peak < 80 * 2**20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--chunks", "3"), "--chunks 3: 8 images make no 3 equal chunks of 2 or more"),
        (("--chunks", "8"), "--chunks 8: 8 images make no 8 equal chunks of 2 or more"),
        (("--chunks", "two"), "--chunks two: write numbers with commas, as in 2,4,8"),
        (("--ways", "gc-magic"), "--ways gc-magic: unknown (valid: ce-chunked, gc-batched"),
        (("--arch", "resnet9"), "unknown architecture 'resnet9'"),
    ],
)
def test_wrong_calls_are_refused(options, message, call):
    code, out, err = call("bench", *SMALL, *options)
    assert (code, out) == (2, "") and message in err and err.startswith("error: ")


def test_a_stem_that_does_not_exist_is_refused(call):
    code, out, err = call("bench", *SMALL, "--stem", "smal")
    assert (code, out) == (2, "") and "'smal' is not one of" in err


def test_a_network_that_cannot_collide_is_refused(call):
    code, _, err = call("bench", "--arch", "mobilenet_v3_small", "--batch-size", 8, "--chunks", 2)
    assert code == 2 and "hardsigmoid" in err and err.count("\n") == 1
