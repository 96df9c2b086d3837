import hashlib
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as TF

from dtlctl.data import tensors
from dtlctl.data.tensors import Batches, Share, crop_and_flip, evaluation_batches, resized_crop_and_flip

SIDE = 8
CPU = torch.device("cpu")


def dataset(images):
    """Image i is labelled 3i mod 7; at row r, column c it has 1 + 8r + c in the first channel, i in the second."""
    pixels = np.zeros((images, 3, SIDE, SIDE), np.uint8)
    pixels[:, 0] = 1 + SIDE * np.arange(SIDE)[:, None] + np.arange(SIDE)
    pixels[:, 1] = np.arange(images)[:, None, None]
    return pixels, 3 * np.arange(images) % 7


def make(images=20, index=None, **more):
    options = {"batch_size": 5, "augment": "none", "seed": 0, "device": CPU} | more
    return Batches(*dataset(images), np.arange(images) if index is None else np.array(index), **options)


def equal(one, other):
    return all(torch.equal(getattr(one, part), getattr(other, part)) for part in ("x", "y", "rows"))


@pytest.mark.parametrize("augment", ["crop-flip", "resized-crop-flip"])
def test_a_batch_depends_on_the_seed_and_its_number_alone(augment):
    forwards, backwards, other = (make(augment=augment, seed=seed) for seed in (3, 3, 4))
    batches = [forwards[step] for step in range(12)]
    for step in (11, 0, 5, 5, 2, 9):
        assert equal(batches[step], backwards[step])
        assert not equal(batches[step], other[step])


@pytest.mark.parametrize(
    ("augment", "seed", "step", "digest"),
    [
        ("none", 0, 0, "a58ed0a48ef61b37"),
        ("none", 0, 7, "8e5271e8889e5772"),
        ("none", 5, 2, "b618b6e768e236ca"),
        ("crop", 0, 0, "3a72975461b7cba8"),
        ("crop", 0, 7, "53007478574544b2"),
        ("crop", 5, 2, "b71ebd53fde94ced"),
        ("crop-flip", 0, 0, "9efb8a2e190c08bf"),
        ("crop-flip", 0, 7, "20044870e672a3a6"),
        ("crop-flip", 5, 2, "3446ba523de88b00"),
    ],
)
def test_batches_are_those_of_published_results(augment, seed, step, digest):
    pixels = (np.arange(40 * 3 * 16 * 16) * 7919 % 251).astype(np.uint8).reshape(40, 3, 16, 16)
    labels, options = np.arange(40) % 7, {"batch_size": 12, "augment": augment, "seed": seed, "device": CPU}
    batch = Batches(pixels, labels, np.arange(40), **options)[step]
    parts = b"".join(part.numpy().tobytes() for part in (batch.x, batch.y, batch.rows))
    assert hashlib.sha256(parts).hexdigest()[:16] == digest


class There(TorchDispatchMode):
    """Counts the operations that give new numbers on torch's `meta` device, which stands for an accelerator."""

    def __init__(self):
        super().__init__()
        self.operations = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view and result.device.type == "meta":
            self.operations[func.overloadpacket.__name__] += 1
        return result


@pytest.mark.parametrize(
    ("augment", "copies", "operations"), [("none", 0, 4), ("crop-flip", 1, 8), ("resized-crop-flip", 1, 7)]
)
def test_a_step_gives_an_accelerator_little_to_do(monkeypatch, augment, copies, operations):
    """Where the images lie there already, as here: each of these costs a launch, each copy a wait for memory too."""
    copied, sent = [], tensors.sent
    monkeypatch.setattr(tensors, "sent", lambda tensor, device: copied.append(tensor) or sent(tensor, device))
    monkeypatch.setattr(tensors, "_resident", lambda pixels, rows, device: torch.tensor(pixels[0])[rows].to(device))
    batches = make(augment=augment, device=torch.device("meta"))
    batches[0]  # an epoch's order is sent with its first batch
    copied.clear()
    with There() as there:
        batches[1]
    assert len(copied) == copies
    assert there.operations.total() == operations, there.operations


@pytest.mark.parametrize("augment", ["none", "crop", "crop-flip"])
def test_an_epoch_visits_every_row_once_in_a_new_order(augment):
    batches = make(augment=augment)
    orders = [torch.cat([batches[4 * epoch + place].rows for place in range(4)]).tolist() for epoch in range(3)]
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3


def test_an_epoch_leaves_out_a_rest_smaller_than_a_batch():
    """23 images in batches of 5: 4 batches of different images, and every image gets its turn in some epoch."""
    batches = make(images=23)
    rows = [torch.cat([batches[4 * epoch + place].rows for place in range(4)]).tolist() for epoch in range(10)]
    assert all(len(set(epoch)) == 20 for epoch in rows)
    assert set().union(*rows) == set(range(23))


def test_batches_are_of_the_chosen_rows_only():
    index = [2, 3, 5, 7, 11, 13, 17, 19]
    batches = make(index=index, batch_size=4)
    assert sorted(torch.cat([batches[0].rows, batches[1].rows]).tolist()) == index
    assert batches.images == 8


def test_without_augmentation_pixels_are_the_images_over_255():
    batch, (pixels, labels) = make()[7], dataset(20)
    assert batch.x.dtype == torch.float32 and batch.y.dtype == batch.rows.dtype == torch.int64
    assert torch.equal(batch.x, torch.from_numpy(pixels)[batch.rows] / 255)
    assert batch.y.tolist() == labels[batch.rows].tolist()


def test_augmented_images_keep_their_labels_and_rows():
    """The second channel says which image it is, in its middle, where no shift of 1 brings in black."""
    batch = make(augment="crop-flip")[3]
    assert (batch.x[:, 1, 4, 4] * 255).round().tolist() == batch.rows.tolist()
    assert batch.y.tolist() == [3 * row % 7 for row in batch.rows.tolist()]


def seen(augment, steps=200):
    """(dy, dx, flipped) of every image of `steps` batches of 20, read from pixel (4, 4) and its right neighbour.

    Unflipped it shows row 4 + dy, column 4 + dx; flipped, column 3 + dx, and columns fall to the right.
    """
    batches = make(augment=augment, batch_size=20)
    x = torch.cat([batches[step].x for step in range(steps)])[:, 0]
    value, right = (x[:, 4, 4:6] * 255).round().long().T - 1
    flipped = right < value
    return torch.stack([value // SIDE - 4, value % SIDE - torch.where(flipped, 3, 4), flipped.long()], 1)


def test_crops_shift_by_an_eighth_at_most_evenly_and_never_flip():
    """4,000 images over 9 shifts: 444 each, deviation sqrt(4000 · 1/9 · 8/9) = 20; five of them are allowed."""
    moves, counts = seen("crop").unique(dim=0, return_counts=True)
    assert moves.tolist() == [[dy, dx, 0] for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    assert (counts - 4000 / 9).abs().max() < 100


def test_flips_mirror_half_of_the_images():
    """4,000 images over 18 moves: 222 each, deviation 14.5; five of them are allowed."""
    moves, counts = seen("crop-flip").unique(dim=0, return_counts=True)
    assert moves.tolist() == [[dy, dx, flip] for dy in (-1, 0, 1) for dx in (-1, 0, 1) for flip in (0, 1)]
    assert (counts - 4000 / 18).abs().max() < 73


def test_images_of_a_batch_move_independently():
    first = seen("crop-flip", steps=1)
    assert len(first.unique(dim=0)) > 5


@pytest.mark.parametrize("processes", [2, 3, 4])
@pytest.mark.parametrize("augment", ["none", "crop-flip", "resized-crop-flip"])
def test_the_shares_of_all_processes_are_the_batch(processes, augment):
    whole = make(batch_size=10, augment=augment)
    parts = [make(batch_size=10, augment=augment, share=Share(rank, processes)) for rank in range(processes)]
    for step in (0, 1, 2, 5):
        shares = [part[step] for part in parts]
        sizes = [len(share.y) for share in shares]
        assert max(sizes) - min(sizes) <= 1
        for name in ("x", "y", "rows"):
            assert torch.equal(torch.cat([getattr(s, name) for s in shares]), getattr(whole[step], name))


def test_a_small_dataset_is_one_batch():
    batches = make(images=3, batch_size=64)
    assert batches.batch_size == 3
    assert all(sorted(batches[step].rows.tolist()) == [0, 1, 2] for step in range(5))


@pytest.mark.parametrize("processes", [1, 3])
def test_evaluation_covers_a_split_in_order_as_it_is(processes):
    pixels, labels = dataset(11)
    shares = [
        evaluation_batches(pixels, labels, device=CPU, share=Share(r, processes), batch_size=2)
        for r in range(processes)
    ]
    batches = [batch for share in shares for batch in share]
    assert max(len(batch.y) for batch in batches) == 2
    x, y, rows = (torch.cat([getattr(b, name) for b in batches]) for name in ("x", "y", "rows"))
    assert rows.tolist() == list(range(11)) and y.tolist() == labels.tolist()
    assert torch.equal(x, torch.from_numpy(pixels) / 255)


def slow_crop_and_flip(image, dy, dx, flip):
    """Pad with as much black on every side, cut the window out, mirror it."""
    size = image.shape[-1]
    padded = np.pad(image, ((0, 0), (size, size), (size, size)))
    window = padded[:, size + dy : 2 * size + dy, size + dx : 2 * size + dx]
    return window[:, :, ::-1] if flip else window


sizes = st.integers(1, 6)
moves = sizes.flatmap(
    lambda size: st.tuples(
        st.just(size),
        st.lists(st.tuples(*[st.integers(1 - size, size - 1)] * 2, st.booleans()), min_size=1, max_size=4),
    )
)


@settings(deadline=None, max_examples=100)
@given(moves, st.sampled_from([np.uint8, np.float32]))
def test_crop_and_flip_agrees_with_one_image_at_a_time(moves, dtype):
    size, each = moves
    images = np.random.default_rng(size).integers(1, 256, (len(each), 2, size, size)).astype(dtype)
    shifts, flips = torch.tensor([m[:2] for m in each]), torch.tensor([m[2] for m in each])
    moved = crop_and_flip(torch.from_numpy(images), shifts, flips).numpy()
    assert moved.dtype == dtype
    np.testing.assert_array_equal(moved, [slow_crop_and_flip(i, *m) for i, m in zip(images, each, strict=True)])


@pytest.mark.parametrize("side", [1, 7, 16])
def test_a_resized_crop_is_torchvision_s(side):
    """Every box within the image, of those of 16 pixels a hundred, mirrored or not, as torchvision's resized_crop."""
    rng = np.random.default_rng(0)
    sides = rng.integers(1, side + 1, (100, 2))
    boxes = torch.from_numpy(np.c_[rng.integers(0, side - sides + 1), sides, rng.integers(0, 2, 100)])
    x = torch.from_numpy(rng.integers(0, 256, (100, 3, side, side), np.uint8))
    expected = []
    for image, (top, left, height, width, mirrored) in zip(x, boxes.tolist(), strict=True):
        crop = TF.resized_crop(image.float(), top, left, height, width, [side, side], antialias=True)
        expected.append(crop.flip(2) if mirrored else crop)
    torch.testing.assert_close(resized_crop_and_flip(x, boxes), torch.stack(expected), atol=1e-3, rtol=0)


def test_boxes_are_drawn_as_torchvision_draws_them():
    """8,000 boxes of each: the same steps of the distributions of sides, areas and places, half of them mirrored.

    A Kolmogorov-Smirnov distance above 0.0325 has probability 0.0005 where both are one distribution.
    """
    batches = make(images=4000, batch_size=4000, augment="resized-crop-flip")
    ours = torch.cat([batches._boxes(step, 64) for step in range(2)]).numpy()
    torch.manual_seed(0)
    image = torch.empty(3, 64, 64)
    draw = RandomResizedCrop.get_params
    theirs = np.array([draw(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(8000)])
    views = [lambda b, n=n: b[:, n] for n in range(4)] + [lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 2] / b[:, 3]]
    for view in views:
        assert ks_2samp(view(ours), view(theirs)).statistic < 0.0325
    assert (ours[:, :2] + ours[:, 2:4] <= 64).all() and (ours >= 0).all()
    assert abs(ours[:, 4].mean() - 0.5) < 5 * 0.5 / 8000**0.5


def test_arrays_that_follow_each_other_are_one_and_only_chosen_rows_are_read():
    """Rows 0 to 5 of one array, 6 to 9 of the next: the same batches as of both in one array."""
    rng = np.random.default_rng(0)
    whole, labels = rng.integers(0, 256, (10, 3, 4, 4), np.uint8), np.arange(10)
    index = np.array([1, 4, 5, 6, 9])
    options = {"batch_size": 2, "augment": "crop-flip", "seed": 3, "device": torch.device("cpu")}
    one = Batches(whole, labels, index, **options)
    two = Batches([whole[:6], whole[6:]], labels, index, **options)
    for step in range(6):
        assert all(torch.equal(a, b) for a, b in zip(vars(one[step]).values(), vars(two[step]).values(), strict=True))
        assert set(one[step].rows.tolist()) <= set(index) and torch.equal(one[step].y, one[step].rows)
