"""An attacker who searches: what came of his trials so far suggests what he tries next.

The suggestions are Optuna's (arXiv:1907.10902), by its tree-structured Parzen estimator (TPE, arXiv:2304.11127).
"""

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, get_args

from pydantic import Field

from dtlctl.attacks.attackers import Attacker, Frozen, Full
from dtlctl.attacks.features import EMBEDDING
from dtlctl.attacks.tuning import Setting, Trial
from dtlctl.data.dataset import Augment
from dtlctl.strict import Algorithm

WAVE = 4
"""So many are suggested before any of them is tried, on any number of cores: or the suggestions would depend on it."""
WEIGHT_DECAYS = 1e-5, 1e-2
CHOICES = {key: get_args(Full.model_fields[key].annotation) for key in ("optimizer", "head")}
CHOICES["augment"] = get_args(Augment)

Point = tuple[Attacker, Setting]
"""An attacker, and one setting that he tries."""


class Search(Algorithm):
    """A search among the attackers' settings, instead of their grids. It needs the extra `optuna`."""

    revision: ClassVar[int] = 2
    trials: int = Field(ge=1, le=100_000)
    """Settings to try in each repetition. Kind, amount, stage, optimiser, augmentation and head are searched, and on a
    logarithmic scale the range from the least to the largest of `lr`, `C` or `k`, a quarter of `steps` to all, and
    weight decay from 0.00001 to 0.01."""


def search(
    attackers: Sequence[Attacker], stages: Sequence[str], trials: int, seed: int,
    attempt: Callable[[list[Point], int], list[Trial]],
) -> tuple[list[Point], list[Trial]]:  # fmt: skip
    """Try so many settings; returns them and what came of each, in order.

    stages: names of the features that the network has. attempt: tries some, told how many were tried before. A search
    that was stopped is begun again with the same suggestions, and `attempt` remembers what it has done.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    points: list[Point] = []
    tried: list[Trial] = []
    while len(tried) < trials:
        asked = [study.ask() for _ in range(min(WAVE, trials - len(tried)))]
        wave = [suggested(one, attackers, stages) for one in asked]
        found = attempt(wave, len(tried))
        for one, trial in zip(asked, found, strict=True):
            study.tell(one, merit(trial))
        points += wave
        tried += found
    return points, tried


def merit(trial: Trial) -> float:
    """Accuracy on held-out images, and up to a point less for the loss: few images make many ties. 0: it diverged."""
    return trial.best.accuracy - min(1.0, trial.best.loss / 100) if trial.best else 0.0


def suggested(trial: Any, attackers: Sequence[Attacker], stages: Sequence[str]) -> Point:
    """What an Optuna trial suggests: one of the attackers with a single setting, which his grid would have too."""
    place = trial.suggest_categorical("attacker", range(len(attackers)))
    attacker: Any = attackers[place]

    def one_of(key: str, choices: Sequence[Any]) -> Any:
        return trial.suggest_categorical(f"{place}.{key}", choices)

    amount, rates = one_of("amount", attacker.amounts()), getattr(attacker, attacker.tried)
    found: dict[str, Any] = {key: [amount] if amount in getattr(attacker, key) else [] for key in attacker.varied}
    stage = optimizer = None
    if isinstance(attacker, Frozen):
        stage = one_of("stage", stages if attacker.stage == "any" else [EMBEDDING])
    else:
        found |= {key: one_of(key, choices) for key, choices in CHOICES.items()}
        found["steps"] = trial.suggest_int(f"{place}.steps", max(1, attacker.steps // 4), attacker.steps, log=True)
        found["weight_decay"] = _short(trial.suggest_float(f"{place}.weight_decay", *WEIGHT_DECAYS, log=True))
        optimizer = found["optimizer"]
        found["layer_decay"] = attacker.layer_decay if optimizer == "adamw" else None
    rate = trial.suggest_float(f"{place}.{attacker.tried}.{optimizer}", min(rates), max(rates), log=True)
    rate = round(rate) if all(isinstance(one, int) for one in rates) else _short(rate)
    chosen = attacker.model_copy(update={**found, attacker.tried: [rate]})
    return chosen, Setting(attacker.kind, optimizer, rate, stage, amount)


def reusable(tables: Iterable[dict[str, Any]]) -> str:
    """The line of a recipe's [piggyback] that names these attackers, each once."""
    written = ["{ " + ", ".join(f"{key} = {json.dumps(value)}" for key, value in one.items()) + " }" for one in tables]
    return f"attackers = [{', '.join(dict.fromkeys(written))}]"


def _short(number: float) -> float:
    """With three digits, as one would write it into a recipe."""
    return float(f"{number:.3g}")
