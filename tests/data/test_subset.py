import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtlctl.data.subset import digest, draw, imbalance, sizes

labels = st.lists(st.integers(1, 30), min_size=1, max_size=6).flatmap(
    lambda counts: st.permutations([label for label, count in enumerate(counts) for _ in range(count)])
)
fractions = st.floats(1e-6, 1)


@given(labels, fractions, st.integers(0, 2**32 - 1))
def test_every_class_has_the_same_share_for_any_fraction(labels, fraction, seed):
    labels = np.array(labels)
    counts = np.bincount(labels)
    index = draw(labels, len(counts), fraction, seed)
    assert index.dtype == np.int64 and (np.diff(index) > 0).all()
    drawn = np.bincount(labels[index], minlength=len(counts))
    if fraction == 1:
        assert (drawn == counts).all()
    else:
        assert (drawn == drawn[0]).all() and 1 <= drawn[0] <= counts.min()
        assert drawn[0] == counts.min() or abs(drawn[0] - max(1, fraction * len(labels) / len(counts))) <= 0.5 + 1e-6


@given(labels, fractions, fractions, st.integers(0, 2**32 - 1))
def test_a_smaller_fraction_is_part_of_a_larger_one(labels, one, other, seed):
    labels = np.array(labels)
    small, large = (draw(labels, labels.max() + 1, f, seed) for f in sorted((one, other)))
    assert set(small) <= set(large)


@pytest.mark.parametrize(
    ("fraction", "each"), [(0.01, 1), (0.014, 1), (0.015, 2), (0.145, 15), (0.1, 10), (0.5, 50), (1e-9, 1)]
)
def test_the_share_is_rounded_half_up_as_the_recipe_writes_it(fraction, each):
    """1,000 rows of 10 classes: 100 a class, so 0.015 is 1.5 -> 2, and 0.145 is 14.5 -> 15 (float: 14.499...)."""
    labels = np.tile(np.arange(10), 100)
    assert (np.bincount(labels[draw(labels, 10, fraction, 0)]) == each).all()


def test_a_draw_depends_on_the_seed_and_its_own_class_alone():
    labels = np.repeat([0, 1], 50)
    first = draw(labels, 2, 0.2, 1)
    assert (first == draw(labels, 2, 0.2, 1)).all()
    assert (first != draw(labels, 2, 0.2, 2)).any()
    assert (first[:10] != first[10:] - 50).any()
    three = np.repeat([0, 1, 2], 50)
    assert (draw(three, 3, 0.2, 1)[:20] == first).all()


def test_digest_is_of_little_endian_int64():
    """1 and 258 = 0x0102 in eight bytes each, least significant first."""
    expected = hashlib.sha256(b"\1\0\0\0\0\0\0\0\2\1\0\0\0\0\0\0").hexdigest()
    assert digest(np.array([1, 258])) == digest(np.array([1, 258], ">i4")) == expected


@pytest.mark.parametrize(
    ("counts", "fraction", "classes", "keep"),
    [
        ([100, 100, 2], 0.8, [2, 2, 2], [80, 80, 2]),  # 1.6 is rounded to 2
        ([1000, 1000, 3], 0.9, [3, 3, 3], [900, 900, 3]),
        ([100, 100, 2], 1, [100, 100, 2], [100, 100, 2]),
        ([10, 5, 3], 0.1, [1, 1, 1], [1, 1, 1]),  # half an image is one, and so is less
    ],
)
def test_sizes_by_hand(counts: list[int], fraction: float, classes: list[int], keep: list[int]):
    found = sizes(counts, fraction, "classes"), sizes(counts, fraction, "keep")
    assert found == (classes, keep)


def test_keep_draws_each_class_by_its_share_and_small_fractions_from_large_ones():
    labels = np.repeat([0, 1, 2], [100, 50, 2])
    half, most = (draw(labels, 3, fraction, 0, "keep") for fraction in (0.5, 0.9))
    assert np.bincount(labels[half]).tolist() == [50, 25, 1] and set(half) <= set(most)


@pytest.mark.parametrize(("counts", "fraction", "drawn"), [([100, 100, 2], 0.8, 6), ([1000, 1000, 3], 0.9, 9)])
def test_a_class_that_limits_the_others_is_named(counts: list[int], fraction: float, drawn: int):
    note = imbalance(counts, ("cat", "dog", "emu"), fraction, "classes")
    assert note is not None and note.number == drawn
    all_of_them = f"fraction = 1 takes all {sum(counts):,}"
    words = (f"draws {drawn} of {sum(counts):,}", f"'emu' has {counts[2]}", 'balance = "keep"', all_of_them)
    assert all(word in note.text for word in words)
    assert imbalance(counts, ("cat", "dog", "emu"), fraction, "keep") is None
    assert imbalance(counts, ("cat", "dog", "emu"), 1, "classes") is None
    assert imbalance([100, 95, 99], ("cat", "dog", "emu"), fraction, "classes") is None


@pytest.mark.parametrize(("counts", "fraction"), [([100] * 10, 0.0149), ([100, 100, 2], 0.02)])
def test_a_subset_that_is_small_by_rounding_blames_no_class(counts: list[int], fraction: float):
    """1.49 of 100 images a class are 1; so are 0.02 * 202 / 3 = 1.35, of a class of two."""
    assert imbalance(counts, [str(n) for n in range(len(counts))], fraction, "classes") is None
