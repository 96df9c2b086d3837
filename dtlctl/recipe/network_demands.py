"""What a recipe demands of its network, looked at before anything trains."""

from collections.abc import Iterator
from importlib.util import find_spec

from torch import nn

from dtlctl.attacks.attackers import NORMS
from dtlctl.errors import RecipeError, first_of, named
from dtlctl.model import networks, weights
from dtlctl.model.batchnorm import BatchNorm
from dtlctl.objectives.batched import batchable
from dtlctl.objectives.unlearn import GradientCollision, NullSpace
from dtlctl.recipe.schema import Recipe


def check(recipe: Recipe, source: str) -> None:
    """Raise RecipeError where the network lacks stages or layers that a variant or an attacker needs.

    And CheckpointError for weights from outside that are not there or not the network's; none are fetched.
    """
    if found := [*_lacking(recipe)]:
        raise RecipeError(f"{source}: {first_of(found)}")
    stages = {"pretrain": recipe.pretrain, "finetune": recipe.finetune, "target-only": recipe.target_only}
    for place, settings in {**stages, **{f"reference.{name}": one for name, one in recipe.reference.items()}}.items():
        if settings and settings.weights:
            with named(f"{source}: {place}.weights"):
                weights.identity(settings.weights, recipe.model.arch)
                if not settings.weights.startswith(weights.REGISTRY):
                    weights.read(settings.weights, recipe.model.model_dump(), getattr(settings, "classes", None))


def _lacking(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(key, reason) of every variant or attacker that asks for stages, layers or a way that the network has not."""
    arch = recipe.model.arch
    for name, settings in recipe.dispose.items():
        twice = isinstance(settings.unlearn, GradientCollision)
        if twice and (operation := networks.no_second_derivative(*recipe.model.shape)):
            reason = f"gradient-collision is differentiated twice, and torch cannot with {operation}, which {arch} has"
            yield f"dispose.{name}.unlearn", f'{reason}; write {{ kind = "random-labels" }}, or take another network'
        if settings.unlearn.memory == "batched" and not batchable(_backbone(recipe)):
            reason = f"{arch} has other layers than convolutions, linear layers and batch norms"
            yield f"dispose.{name}.unlearn.memory", f'"batched": {reason}; write "auto", "keep" or "recompute"'
        asked = {"fresh_stages": settings.fresh_stages}
        if isinstance(settings.unlearn, NullSpace):
            asked["unlearn.stages"] = settings.unlearn.stages or 1
        for key, count in asked.items():
            if count and count > (known := len(networks.stages(_backbone(recipe)))):
                reason = f"{count}, but {arch} has {known} stages; write {known} or less"
                if not known:
                    other = "leave it out" if key == "fresh_stages" else 'write unlearn = { kind = "random-labels" }'
                    reason = f"the stages of {arch} are not known; {other}, or take another network"
                yield f"dispose.{name}.{key}", reason
    yield from _lacking_to_attackers(recipe)


def _backbone(recipe: Recipe) -> nn.Module:
    """Asked for only where something is demanded of it: most recipes need not wait until it is built."""
    return networks.outline(*recipe.model.shape).backbone


def _lacking_to_attackers(recipe: Recipe) -> Iterator[tuple[str, str]]:
    if recipe.piggyback.search and not find_spec("optuna"):
        yield "piggyback.search", "needs the package optuna: pip install 'dtlctl[optuna]'; or leave it out, for grids"
    needed = {"renorm": ("batch normalisation", BatchNorm), "norms": ("normalisation", NORMS)}
    for number, attacker in enumerate(recipe.piggyback.attackers):
        lacking, deepest = "", max(getattr(attacker, "stages", [0]))
        if deepest and deepest > len(networks.stages(_backbone(recipe))):
            lacking = f"{deepest} known stages"
        for word, (layers, kinds) in needed.items():
            if word in attacker.kind and not any(isinstance(module, kinds) for module in _backbone(recipe).modules()):
                lacking = layers
        if lacking:
            reason = f'kind "{attacker.kind}" needs {lacking}, which {recipe.model.arch} does not have; leave it out'
            yield f"piggyback.attackers.{number}", reason
