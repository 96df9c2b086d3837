"""The membership attacks by name: what each sees of an image, and who makes a score of it. A new one is a line here."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from dtlctl.attacks import adversarial, gradients, signals, whitebox
from dtlctl.attacks.membership import Attacker, single
from dtlctl.attacks.signals import View
from dtlctl.recipe.schema import Audit


class Attack(NamedTuple):
    observe: Callable[[View, Audit], dict[str, Tensor]]
    """What is seen of the n images in view: tensors [n, ...] by name."""
    attacker: Attacker
    """`single` reports each name as a result of its own; a learner takes all names together."""
    slow: bool = False
    """Repeated `wb_repeats` times, not `repeats`."""


# rmia is not here: its references are a matter of the whole run, which the stage knows.
ATTACKS: dict[str, Attack] = {
    "loss": Attack(lambda view, _: signals.loss(view), single),
    "entropy": Attack(lambda view, _: signals.entropy(view), single),
    "modified-entropy": Attack(lambda view, _: signals.modified_entropy(view), single),
    "max-softmax": Attack(lambda view, _: signals.max_softmax(view), single),
    "adv-dist": Attack(lambda view, settings: adversarial.distance(view, settings.adv_steps), single),
    "grad-w": Attack(lambda view, _: gradients.weights(view), signals.logistic),
    "grad-x": Attack(lambda view, _: gradients.pixels(view), signals.logistic),
    "wb": Attack(lambda view, _: whitebox.observe(view), whitebox.infer, slow=True),
}
