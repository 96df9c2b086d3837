"""The membership attacks by name: what each sees of an image, and who makes a score of it. A new one is a line here."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from dtlctl.attacks import adversarial, signals, whitebox
from dtlctl.attacks.membership import Learner, single
from dtlctl.attacks.signals import Observation


class Attack(NamedTuple):
    observe: Callable[[Observation, int], dict[str, Tensor]]
    """(view, steps of an iterated search) -> what is seen of the n images in view: tensors [n, ...] by name."""
    attacker: Learner
    """`single` reports each name as a result of its own; a learner takes all names together."""
    slow: bool = False
    """Repeated `wb_repeats` times, not `repeats`."""
    revision: int = 1
    """Raised whenever the attack computes something else: its earlier results are then made again."""


REFERENCED = {"rmia": 2, "lira": 2}
"""Attacks with reference models, which are a matter of the whole run: the stage makes them. Their revisions."""

ATTACKS: dict[str, Attack] = {
    "loss": Attack(lambda view, _: signals.loss(view), single),
    "entropy": Attack(lambda view, _: signals.entropy(view), single),
    "modified-entropy": Attack(lambda view, _: signals.modified_entropy(view), single),
    "max-softmax": Attack(lambda view, _: signals.max_softmax(view), single),
    "adv-dist": Attack(adversarial.distance, single),
    "grad-w": Attack(lambda view, _: whitebox.grad_w(view), signals.logistic, revision=3),
    "grad-x": Attack(lambda view, _: whitebox.grad_x(view), signals.logistic),
    "wb": Attack(lambda view, _: whitebox.observe(view), whitebox.infer, slow=True, revision=3),
}
