"""What jobs take here: a little of each is done on noise, timed, and multiplied. Coarse, and a matter of seconds."""

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dtlctl.attacks import membership, signals
from dtlctl.attacks.attackers import Frozen, SelfTraining
from dtlctl.attacks.registry import ATTACKS
from dtlctl.attacks.tuning import EVALUATIONS
from dtlctl.console import devices
from dtlctl.data.tensors import Batch
from dtlctl.model import networks
from dtlctl.objectives.disposal import Disposal
from dtlctl.recipe.plan import Job
from dtlctl.recipe.schema import Recipe
from dtlctl.recipe.settings import Audit, Piggyback

MOST = 64
"""Images of a step that is timed: larger batches take as long an image, and `check` should be quick."""
LOOKED, FITTED = 16, 256
"""Images that an attack looks at, and that a classifier is fitted to."""
FORWARD = 1 / 3
"""A forward pass, as a share of a step of training."""
CROWDED = 1.5
"""So many times slower than one are several threads that keep each other waiting."""


def crowded() -> str | None:
    """What to say of a machine whose other work makes this process's threads slower than one; from here on it has one.

    Beside a busy core a step of two threads was seen to take up to a hundred times that of one: no time to plan by.
    """
    if (threads := torch.get_num_threads()) == 1 or devices.kind() != "cpu":
        return None
    image, layer = torch.rand(64, 16, 32, 32), nn.Conv2d(16, 32, 3)

    def convolutions(by: int) -> float:
        torch.set_num_threads(by)
        layer(image).sum().backward()  # the first is not counted
        return seconds(lambda: [layer(image).sum().backward() for _ in range(5)])

    if (ratio := convolutions(threads) / convolutions(1)) > CROWDED:
        return f"other work is done here: one thread is {ratio:.1f} times as fast as {threads}; set OMP_NUM_THREADS=1"
    torch.set_num_threads(threads)
    return None


class Clock:
    """How long an image takes here in a step of training, and in a step of a variant's disposal: [2] seconds.

    Each is measured once: the quickest and the slowest of some whole steps of this network on noise, on the device and
    with the threads that a run would have.
    """

    def __init__(self, recipe: Recipe):
        self.recipe, self.device = recipe, torch.device(devices.kind())
        network = self.network()
        self.parameters = sum(p.numel() for p in network.parameters())
        self.features, self.stages = network.features, len(networks.stages(network.backbone)) + 1
        self.image = cache(self._image)

    def _image(self, variant: str = "") -> np.ndarray:
        """Of an image in training; in a variant's disposal, of an image of the source and all that goes with it."""
        settings: Any = self.recipe.dispose[variant] if variant else self.recipe.pretrain
        chunks = settings.unlearn.chunks if variant else 1
        size = min(settings.batch_size, max(MOST, 2 * chunks)) // chunks * chunks
        loss, times = self._loss(variant, size), list[float]()
        while len(times) < 2 or (sum(times) < 1.0 and len(times) < 20):
            started = devices.clock(self.device)
            loss().backward()
            times.append(devices.clock(self.device) - started)
        return np.array([min(times[1:]), max(times[1:])]) / size  # the first is not counted

    def network(self) -> networks.Classifier:
        spec = self.recipe.model
        model = networks.build(heads={"source": 100, "target": 10}, **spec.model_dump(exclude={"channels_last"}))
        model.precision, model.channels_last = self.recipe.precision, spec.channels_last
        return model.to(self.device)

    def noise(self, size: int) -> Batch:
        x = torch.rand(size, 3, *2 * [self.recipe.model.image_size], device=self.device)
        return Batch(x, torch.zeros(size, dtype=torch.int64, device=self.device), torch.arange(size))

    def _loss(self, variant: str, size: int) -> Callable[[], Tensor]:
        student, batch = self.network(), self.noise(size)
        if not variant:
            return lambda: cross_entropy(student(batch.x, "source"), batch.y)
        settings, teacher = self.recipe.dispose[variant], self.network().eval().requires_grad_(False)
        unlearn, retain, lam = settings.unlearn, settings.retain, settings.lam or 0.5
        fixed: Any = {"batch_norm": "train", "images": size, "label_seed": 0}
        disposal = Disposal(lam, unlearn, retain, student, teacher, chunks=unlearn.chunks, **fixed)
        return lambda: disposal(batch, batch if retain.needs_target else None, True)[0]


def training(job: Job[Any], images: int, clock: Clock, tests: int = 0, classes: int = 10) -> np.ndarray:
    """Seconds [2] that a job that trains takes on so many images of so many classes; tests: of its test split."""
    settings = job.settings
    seen = settings.total_steps(images) * min(settings.batch_size, images)
    if job.stage == "dispose":
        return ((1 - settings.repair) * clock.image(job.model) + settings.repair * clock.image()) * seen
    tuned = attackers(settings, images, tests, classes, clock) if job.stage == "piggyback" else 0
    return clock.image() * seen + tuned


def attackers(settings: Piggyback, images: int, tests: int, classes: int, clock: Clock) -> np.ndarray:
    """Seconds [2] that tuned attackers take with so many images of their own; tests: of the test split."""
    held, total = tests // 2 if settings.choose_on == "test" else settings.held_out * images, np.zeros(2)
    for attacker in settings.attackers:
        tried: float = len(attacker.grid([""] * clock.stages))
        if settings.search:
            tried = settings.search.trials / len(settings.attackers)
        if isinstance(attacker, Frozen):
            rates = getattr(attacker, attacker.tried)
            fit = _fit(type(attacker), rates[len(rates) // 2], min(images, FITTED), classes, clock.features)
            total += (tried + 1) * fit * max(1.0, images / FITTED) / torch.get_num_threads()
            total += FORWARD * clock.image() * (images + tests) * len(attacker.amounts())
        else:  # a search tries shorter ones too
            steps = attacker.steps * (0.5 if settings.search else 1) * (2 if isinstance(attacker, SelfTraining) else 1)
            looks = FORWARD * (tried * EVALUATIONS * held + tests)
            total += ((tried + 1) * steps * min(attacker.batch_size, images) + looks) * clock.image()
    return settings.attack_seeds * total


def audit(settings: Audit, source: dict[str, Any], target: dict[str, Any], clock: Clock) -> np.ndarray | None:
    """Seconds [2] of the audit of one model besides references. source, target: {"images", "test_images"}, if known."""
    total = np.zeros(2)
    for mode in settings.modes:
        known = target if mode == "target" else source
        if known["images"] is None or known["test_images"] is None:
            return None
        images = min(settings.images, known["images"], known["test_images"])
        total += FORWARD * 2 * images * clock.image()  # shared by all attacks that see no more than answers
        for name in settings.attacks:
            if mode != "target" or name in ATTACKS:
                total += _attack(name, images, settings, clock)
    looked = source["test_images"] + (5 * min(1000, source["test_images"]) if settings.cka else 0)
    return total + (64 * settings.relearn_steps + FORWARD * looked) * clock.image()


def _attack(name: str, images: int, settings: Audit, clock: Clock) -> np.ndarray:
    """Seconds [2] of one attack on so many members and as many others."""
    attack = ATTACKS.get(name, ATTACKS["loss"])  # whose score that of an attack with references is like
    model, noise = clock.network().eval().requires_grad_(False).through("source"), clock.noise(LOOKED)
    few, view = (signals.Observation(model, [(noise.x[:n], noise.y[:n])]) for n in (2, LOOKED))
    seen = attack.observe(few, 1)  # what it imports is not counted
    signals.loss(view)  # nor are answers, which the attacks share
    looking = seconds(lambda: attack.observe(view, 1)) / LOOKED
    made = np.random.default_rng(0).standard_normal
    alone = attack.attacker is membership.single  # then each name is judged by itself, and one repeat judges twice
    shapes = {one: values.shape[1:] for one, values in (list(seen.items())[:1] if alone else seen.items())}

    def judge(count: int) -> None:
        members, others = ({one: made((count, *shape)) for one, shape in shapes.items()} for _ in range(2))
        membership.trial(members, others, attack.attacker, 1, 0)

    judge(50)  # nor is what this imports
    repeats: float = settings.wb_repeats if attack.slow else settings.repeats
    judging = seconds(lambda: judge(images)) * (len(seen) * (repeats + 1) / 2 if alone else repeats)
    steps = 2 * (settings.adv_steps - 1) if name == "adv-dist" else 0  # of two searches, each with a gradient
    return judging + 2 * images * (looking + steps * clock.image())


@cache
def _fit(kind: Any, rate: float, images: int, classes: int, width: int) -> float:
    """Seconds to fit a frozen attacker's classifier to so many images with `width` features of noise each."""
    x, y = np.random.default_rng(0).standard_normal((images, width)), np.arange(images) % classes
    kind().fit(x[:2], y[:2], rate)  # what it imports is not counted
    return seconds(lambda: kind().fit(x, y, rate))


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
