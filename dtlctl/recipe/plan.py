"""What a recipe asks for, in order, and what each result depends on. Pure data: nothing here trains or loads."""

from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar, get_args

from dtlctl.attacks.attackers import SelfTraining
from dtlctl.attacks.registry import ATTACKS, REFERENCED
from dtlctl.recipe.schema import Recipe
from dtlctl.strict import Strict

Stage = Literal["pretrain", "finetune", "dispose", "piggyback", "audit"]
STAGES: tuple[Stage, ...] = get_args(Stage)
Settings = TypeVar("Settings", bound=Strict)

LATER = {"optimizer", "label_smoothing", "layer_decay", "patience", "settle", "search", "cka"}
LATER_OF_ATTACKERS = {"weight_decay", "augment", "head", "layer_decay"}
"""Keys that recipes did not always have: with their defaults a result is the one that it was without them."""


@dataclass(frozen=True)
class Job(Generic[Settings]):
    """One result: a model, or one attack on one model."""

    stage: Stage
    model: str
    """The model that is made or attacked: scratch, TGT, pre, TL or a variant's name."""
    path: str
    """Its sidecar, relative to the run's folder."""
    settings: Settings
    roles: tuple[str, ...]
    """Datasets it reads: source, target, or piggyback.NAME."""
    parent: str | None
    """The model it starts from, if any."""

    def described(self, recipe: Recipe) -> dict[str, Any]:
        """What the recipe says that this result depends on; not who else is attacked, nor how memory is used."""
        aside: Any = {"models": True, "unlearn": {"memory"}, "attackers": {"__all__": {"datasets"}}}
        settings = self.settings.model_dump(mode="json", by_alias=True, exclude=aside)
        chosen = self.settings.model_dump(exclude_defaults=True)
        outside = {name: settings.pop(name, None) for name in ("weights", "classes")}
        if self.weights:
            settings = outside
        idle = LATER - chosen.keys()
        if settings.get("patience", 0) is None:
            idle.add("held_out")
        if settings.get("lambda") is not None:
            idle.add("draws")
        if not settings.get("attackers", True):
            idle |= {"attackers", "attack_seeds", "held_out", "choose_on", "search"}
        for name in idle:
            settings.pop(name, None)
        for attacker, named in zip(settings.get("attackers", []), chosen.get("attackers", []), strict=True):
            for name in LATER_OF_ATTACKERS - named.keys():
                attacker.pop(name, None)
        if "cka" in settings:  # the others that it is compared with made this one; weights from outside are no path
            settings["compared"] = {**(recipe.target_only or recipe.finetune).model_dump(mode="json"), "weights": None}
        if settings.get("references") and (recipe.pretrain.weights or recipe.finetune.weights):
            settings["referenced"] = references(recipe).described(recipe)  # no parent tells of it
        own_seed = settings.pop("seed", None)
        return {
            "settings": settings,
            "revisions": self.revisions(),
            "architecture": recipe.model.described(),
            "seed": 0 if self.weights else recipe.seed if own_seed is None else own_seed,
            "precision": recipe.precision,
        }

    def revisions(self) -> dict[str, int]:
        """Of the stage, and of the losses or attacks that it uses: a mended one makes its results anew."""
        settings: Any = self.settings
        parts: dict[str, int] = {"stage": settings.revision}
        if self.stage == "dispose":
            parts |= {"unlearn": settings.unlearn.revision, "retain": settings.retain.revision}
        if self.stage == "piggyback":
            parts |= {attacker.kind: attacker.revision for attacker in settings.attackers}
            parts |= {"search": settings.search.revision} if settings.search and settings.attackers else {}
        if self.stage == "audit":
            known = {**{name: attack.revision for name, attack in ATTACKS.items()}, **REFERENCED}
            parts |= {name: known[name] for name in settings.attacks}
        return parts

    def batches(self, images: dict[str, int], processes: int) -> dict[str, int]:
        """Images of a step, by role: fewer than the recipe's `batch_size` where there are not as many.

        A disposal's batch is cut into equal chunks on equal processes, so of a small dataset it depends on them.
        """
        settings: Any = self.settings
        if self.stage == "audit" or self.weights:
            return {}
        if self.stage != "dispose":
            return {self.dataset: min(settings.batch_size, images[self.dataset])}
        roles = ("source", "target") if settings.retain.needs_target else ("source",)
        return {role: settings.equal_parts(images[role], processes) for role in roles}

    @property
    def beyond(self) -> str | None:
        """The dataset of which images count that its fraction leaves out: a price and self-training look at them."""
        settings: Any = self.settings
        priced = self.stage == "dispose" and settings.price is not None
        asking = self.stage == "piggyback" and any(isinstance(one, SelfTraining) for one in settings.attackers)
        return self.roles[-1] if priced or asking else None

    @property
    def weights(self) -> str | None:
        """Where the model comes from, if it is not trained but adopted."""
        return getattr(self.settings, "weights", None)

    @property
    def makes_model(self) -> bool:
        return self.stage not in ("piggyback", "audit")

    @property
    def dataset(self) -> str:
        """The first dataset: the one it trains on, if it does."""
        return self.roles[0]

    @property
    def title(self) -> str:
        return self.path.removesuffix(".json").removesuffix("/model")


def references(recipe: Recipe) -> Job[Any]:
    """How the references of rmia and lira learn it: as `pre` does, or would if it were not from outside."""
    trained = recipe.pretrain.model_copy(update={"weights": None, "classes": None})
    return Job("pretrain", "pre", "pretrain/model.json", trained, ("source",), None)


def jobs(recipe: Recipe) -> list[Job[Any]]:
    """Every result of the recipe, each after what it depends on."""
    adopted, tgt = recipe.finetune.weights, recipe.target_only or recipe.finetune
    if adopted and recipe.target_only is None:
        length = {} if tgt.epochs or tgt.steps else {"epochs": Recipe.model_fields["finetune"].default.epochs}
        tgt = tgt.model_copy(update={"weights": None, "classes": None, **length})
    plan: list[Job[Any]] = [
        *([] if adopted else [Job("pretrain", "pre", "pretrain/model.json", recipe.pretrain, ("source",), None)]),
        Job("finetune", "TGT", "target-only/model.json", tgt, ("target",), None),
        Job("finetune", "TL", "finetune/model.json", recipe.finetune, ("target", "source"), None if adopted else "pre"),
    ]
    for name, reference in recipe.reference.items():
        plan.append(Job("pretrain", name, f"reference/{name}/model.json", reference, (), None))
    for variant, settings in recipe.dispose.items():
        plan.append(Job("dispose", variant, f"dispose/{variant}/model.json", settings, ("source", "target"), "TL"))
    for name in recipe.data.piggyback:
        own = [one for one in recipe.piggyback.attackers if one.datasets is None or name in one.datasets]
        attack = recipe.piggyback.model_copy(update={"attackers": own})
        for model in recipe.piggyback.models or [*recipe.references, *recipe.dispose]:
            parent = None if model == "scratch" else model
            path = f"piggyback/{model}/{name}.json"
            plan.append(Job("piggyback", model, path, attack, (f"piggyback.{name}",), parent))
    for model in recipe.audit_models:
        trained_on = ("source",) if model == "pre" else ("source", "target")
        plan.append(Job("audit", model, f"audit/{model}.json", recipe.audit, trained_on, model))
    return plan
