"""Images that stand in two places."""

from __future__ import annotations

import numpy as np
import pytest

from dtlctl.data import overlap
from dtlctl.data.entry import Images
from dtlctl.data.pixels import Rule
from dtlctl.errors import DataError


def images(*names: bytes, fingerprint: str = "", labels: tuple[int, ...] = (), drawn: int | None = None) -> Images:
    hashes = np.array([name.ljust(16, b"\0") for name in names], "V16")
    numbers = np.array(labels or [0] * len(names))
    rows = np.arange(len(names) if drawn is None else drawn)
    return Images(np.zeros(0), numbers, ("a", "b"), fingerprint, "", 0, (), hashes, Rule(), rows, fingerprint)


def test_copies_of_pixels_are_found_whatever_their_bytes():
    """Hashes that end in zeros, or differ in the last byte alone, are told apart."""
    one, two = np.array([b"a" * 15 + b"\0", b"b" * 16], "V16"), np.array([b"a" * 15 + b"\1", b"b" * 16], "V16")
    assert overlap.among(one, two).tolist() == [False, True]


def test_a_split_that_is_mostly_in_the_other_is_refused():
    """2 of 3 test images; 1 of 2 is half, and told."""
    train = images(b"1", b"2", b"3")
    with pytest.raises(DataError, match=r"data\.source: 2 of 3 test images are in the train split too"):
        overlap.within("source", train, images(b"1", b"2", b"9"))
    notes = {note.kind: note.number for note in overlap.within("source", train, images(b"1", b"9"))}
    assert notes == {"test-in-train": 1}


def test_copies_among_drawn_images_stand_for_as_large_a_share_of_all():
    """20 of 40 training images are drawn: 11 of 40 test images among them would be 22 of 40, and 10 half. 4 of 8 of a
    smaller split may be chance. What is not drawn is not looked at."""
    train = images(*(b"%d" % n for n in range(40)), drawn=20)
    with pytest.raises(DataError, match=r"11 of 40 test images are among the 20 that are drawn from the train split"):
        overlap.within("source", train, images(*(b"%d" % n for n in range(9, 49))))
    for test in (range(10, 50), range(16, 24)):
        found = overlap.within("source", train, images(*(b"%d" % n for n in test)))
        assert [(note.kind, note.number) for note in found] == [("test-in-train", 20 - test[0])]


def test_images_that_are_there_twice_are_counted():
    notes = overlap.within("source", images(b"1", b"1", b"1", b"2"), images(b"8", b"8", b"9"))
    assert [(note.kind, note.number) for note in notes] == [("twice-in-train", 2), ("twice-in-test", 1)]


def test_an_image_under_two_classes_is_counted():
    """ "1" within train, "2" over the splits; "3" is there twice under one class."""
    train = images(b"1", b"1", b"2", b"3", labels=(0, 1, 0, 1))
    notes = overlap.within("source", train, images(b"2", b"3", b"8", b"9", labels=(1, 1, 0, 0)))
    assert {note.kind: note.number for note in notes}["two-classes"] == 2


def test_training_images_of_two_roles_are_told_of_the_later():
    data = {
        "source": (images(b"1", b"2", b"3", fingerprint="s"), images(b"8")),
        "target": (images(b"2", b"3", b"4", fingerprint="t"), images(b"9")),
    }
    found = {role: [(note.kind, note.number) for note in notes] for role, notes in overlap.across(data).items()}
    assert found == {"source": [], "target": [("train-in-source", 2)]}


def test_a_target_that_is_the_source_is_told_wherever_it_lies():
    """By the split in the cache, or, for a copy, by all that is in it; an attacker's copy of the source is no fault."""
    source = images(b"1", b"2", fingerprint="s"), images(b"8")
    copied = images(b"1", b"2", fingerprint="s")._replace(split="elsewhere"), images(b"9")
    for target in (source, copied):
        data = {"piggyback.copy": source, "target": target, "source": source}
        found = {role: [(note.kind, note.number) for note in notes] for role, notes in overlap.across(data).items()}
        assert found == {"piggyback.copy": [], "target": [("same-as-source", 2)], "source": []}
    assert overlap.across({"target": source, "piggyback.copy": source}) == {"target": [], "piggyback.copy": []}


def test_roles_on_different_guessed_scales_are_told():
    """A source of 12 bits beside a target of 8; two roles of 16 bits agree, and so do shares of 1 and bytes."""

    def scales(**full: int | None) -> list[tuple[str, str]]:
        data = {}
        for role, scale in full.items():
            train = images(role.encode(), fingerprint=role)._replace(rule=Rule(scale))
            data[role] = train, images(role.upper().encode())
        return [(role, note.kind) for role, notes in overlap.across(data).items() for note in notes]

    assert scales(source=4095, target=None) == [("source", "other-scale")]
    source = images(b"1", fingerprint="s")._replace(rule=Rule(65535)), images(b"2")
    (note,) = overlap.across({"source": source, "target": (images(b"3", fingerprint="t"), images(b"4"))})["source"]
    assert note.text.startswith("images of more than 8 bits are read by 0-65535,")  # its others are read by 0-255
    assert scales(source=65535, target=65535) == scales(source=1, target=None) == []


def test_test_images_of_one_role_are_looked_for_among_the_training_images_of_others():
    """The attacker's copy of the source is passed over; his own images that the source was trained on are told."""
    source = images(b"1", b"2", b"3", fingerprint="s"), images(b"4", b"5")
    data = {
        "source": source,
        "target": (images(b"4", b"7", fingerprint="t"), images(b"1", b"2", b"8")),
        "piggyback.copy": source,
        "piggyback.own": (images(b"6", fingerprint="p"), images(b"3")),
    }
    found = {role: {note.kind: note.number for note in notes} for role, notes in overlap.across(data).items()}
    assert found == {
        "source": {"test-in-target": 1},
        "target": {"test-in-source": 2},
        "piggyback.copy": {"test-in-target": 1},
        "piggyback.own": {"test-in-source": 1},
    }
