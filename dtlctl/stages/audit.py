"""What a model still tells about its source training set: membership inference (section 4.4), and two readouts."""

import time
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dtlctl.attacks import membership, signals
from dtlctl.attacks.registry import ATTACKS, Attack
from dtlctl.attacks.signals import Observation
from dtlctl.data import overlap
from dtlctl.data.dataset import Split
from dtlctl.errors import DataError, counted
from dtlctl.recipe.plan import Job
from dtlctl.recipe.settings import Audit
from dtlctl.run.experiment import Experiment
from dtlctl.stages import readout, reference
from dtlctl.storage.parts import Parts
from dtlctl.training.engine import History
from dtlctl.training.failures import check_finite

LEAST = 20
"""Members, and non-members, that can be split three ways."""
HEAD_SHARE = 0.2
"""Of the images of either group, those that the attacker fits a head on in reprobe mode. They are never attacked."""
WORTH_SAYING = 0.5
"""Below this share of the smaller group, it is said how many images are attacked."""
COPIES = 0.01
"""Share of the test images that may be training images too; they are left out. With more there is no audit."""
BLIND_LIMIT = 0.65
"""An attacker who never asks the model must not be surer than this (lower end of his AUC's interval)."""
Role = Literal["source", "target"]


class Reread:
    """Images and labels of some rows, batch by batch, as often as they are asked for: none of them is kept."""

    def __init__(self, experiment: Experiment, role: Role, split: Split, rows: np.ndarray):
        self.experiment, self.role, self.split, self.rows = experiment, role, split, rows

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return ((batch.x, batch.y) for batch in self.experiment.trainer.split(self.role, self.split, self.rows))


class Groups(NamedTuple):
    """Rows of the train split (members) and test split (others) of the source, or of the target; all disjoint."""

    members: np.ndarray
    others: np.ndarray
    head_members: np.ndarray
    head_others: np.ndarray


def audit(experiment: Experiment, job: Job[Audit]) -> None:
    """Attack as many training images of the source as test images, through its source head and through a new one.

    Raises DataError for groups that are too small or told apart without the model, DivergedError for answers of nan.
    """
    started, settings, finished = time.perf_counter(), job.settings, experiment.results.parts(job)
    head = Head(experiment, job, "source")
    metrics, costs = head.described() | {"source_head": _head_state(experiment, job)}, dict[str, Any]()
    metrics["entropy_readout"] = readout.uncertainty(experiment, head.model)
    metrics["relearning"] = None
    if settings.relearn_steps:
        relearn = partial(readout.relearning, experiment, job.model, settings)
        metrics["relearning"] = finished.common(experiment.engine, "relearning", dict[str, Any], relearn)
    if settings.cka and "target" in job.roles:
        metrics["cka"] = readout.similarity(experiment, job.model)
    if "as-is" in settings.modes:
        found, costs["as-is"] = head.attack("as-is", finished)
        metrics.update(found)
    if "reprobe" in settings.modes:
        _, _, *own = head.groups
        readout.fit_head(experiment, head.model, "source", [*zip(reference.SPLITS, own, strict=True)])
        metrics["reprobe"], costs["reprobe"] = head.attack("reprobe", finished)
    if "target" in settings.modes and "target" in head.model.heads:
        head = Head(experiment, job, "target")
        metrics["target"] = head.described()
        found, costs["target"] = head.attack("target", finished)
        metrics["target"] |= found
    metrics["cost"] = costs
    experiment.results.publish(job, metrics, History(seconds=time.perf_counter() - started))


class Head:
    """One head of a model, and the images that it is asked about."""

    def __init__(self, experiment: Experiment, job: Job[Audit], role: Role):
        self.experiment, self.job, self.settings, self.role = experiment, job, job.settings, role
        self.groups, self.matched = groups(experiment, job, role)
        say_left_out(experiment, job, self.matched)
        self.model = experiment.trainer.load_model(job.model).eval().requires_grad_(False)

    def views(self) -> list[Observation]:
        """Of members and of others."""
        seen, sides = self.model.through(self.role), zip(reference.SPLITS, self.groups[:2], strict=True)
        return [Observation(seen, Reread(self.experiment, self.role, *side)) for side in sides]

    def described(self) -> dict[str, Any]:
        """Who is attacked, and how well the groups are told apart without the model: DataError where too well."""
        classes = len(self.experiment.data.classes(self.role))
        control = Attack(lambda view, _: signals.blind(view, classes), signals.logistic)
        blind = self._judge(control, "blind", self._see(control, self.views()))["blind"]
        if blind["auc_low"] > BLIND_LIMIT:
            raise DataError(
                f"{self.job.title}: data.{self.role}: train and test images differ without any model "
                f"(AUC {blind['auc']:.2f} on pixel statistics and classes)\n"
                "prepare both splits in the same way, or every attack is credited with it"
            )
        members, others = map(len, self.groups[:2])
        return {"members": members, "others": others, "matched": self.matched, "blind": blind}

    def attack(self, mode: str, finished: Parts) -> tuple[dict[str, Any], dict[str, Any]]:
        """Every attack of the recipe, each kept as soon as it is done: results by name, and the cost."""
        views, found, costs = self.views(), dict[str, Any](), dict[str, Any]()

        def attacked(name: str) -> tuple[dict[str, Any], dict[str, float]]:
            started, attack = time.perf_counter(), ATTACKS.get(name) or self.referenced(name)
            results = self._judge(attack, name, self._see(attack, views))
            if name == "rmia":
                results[name]["a"] = reference.answers(self.experiment, self.settings.references).a
            return results, {"seconds": round(time.perf_counter() - started, 3)}

        form = tuple[dict[str, Any], dict[str, float]]
        for name in [name for name in self.settings.attacks if self.role == "source" or name in ATTACKS]:
            make = partial(attacked, name)
            results, costs[name] = finished.common(self.experiment.engine, f"{mode}-{name}", form, make)
            found |= results
        return found, costs

    def referenced(self, name: str) -> Attack:
        """RMIA or LiRA, with what the references said of each image, found by the image's split and row."""
        known = reference.answers(self.experiment, self.settings.references)
        rmia, lira = partial(signals.rmia, a=known.a), partial(signals.lira, variance=known.variance)
        score = rmia if name == "rmia" else lira

        def observe(view: Observation, _: int) -> dict[str, Tensor]:
            assert isinstance(view.batches, Reread)
            out = torch.from_numpy(known.out[view.batches.split][view.batches.rows])
            return score(view, self.experiment.engine.share.of(out))

        return Attack(observe, membership.single)

    def _see(self, attack: Attack, views: list[Observation]) -> list[dict[str, np.ndarray]]:
        """What the attack sees of every image of all processes' shares, in order: of members and of others.

        Raises DivergedError where that is not finite, as gradients can be though all answers are.
        """
        gather, seen = self.experiment.engine.gather, [attack.observe(view, self.settings.adv_steps) for view in views]
        whole = [{name: gather(values).cpu().double() for name, values in side.items()} for side in seen]
        for side in whole:
            for values in side.values():
                check_finite(values)
        return [{name: values.numpy() for name, values in side.items()} for side in whole]

    def _judge(self, attack: Attack, name: str, seen: list[dict[str, np.ndarray]]) -> dict[str, Any]:
        """Repeated trials: {name: numbers}; an attack that trains nothing has one for each thing it saw."""
        members, others = seen
        repeats = self.settings.wb_repeats if attack.slow else self.settings.repeats
        seed = self.experiment.recipe.stream("audit/trials")
        trial = partial(membership.trial, attacker=attack.attacker, repeats=repeats, seed=seed)
        if attack.attacker is not membership.single:
            return {name: trial(members, others)}
        return {one: trial({one: members[one]}, {one: others[one]}) for one in members}


def groups(experiment: Experiment, job: Job[Audit], role: Role = "source") -> tuple[Groups, dict[str, int]]:
    """As many members as others of every class, drawn at random; in reprobe mode a fifth is for the attacker's head.

    And what was left out: {"pairs", "members_left_out", "others_left_out", "classes_left_out", "copies"}: classes that
    one side lacks, and test images that are members. Raises DataError for too few pairs and too many copies.
    """
    train, member_rows = experiment.data.images(role, "train"), experiment.data.index(role)
    test = experiment.data.images(role, "test")
    seen = [experiment.data.images(name, "train").hashes[experiment.data.index(name)] for name in job.roles]
    rows = np.flatnonzero(~overlap.among(test.hashes, np.concatenate(seen)))
    if (copies := len(test.labels) - len(rows)) > COPIES * len(test.labels):
        raise DataError(
            f"{job.title}: {', '.join(f'data.{name}' for name in job.roles)}: {copies:,} of {len(test.labels):,} "
            f"non-members are members: test images of the {role} that are trained on too\n"
            "take them out of one of the two splits, or every attack looks weaker than it is"
        )
    labels, answers = train.labels[member_rows], test.labels[rows]
    places, others = membership.matched(labels, answers, np.random.default_rng(experiment.recipe.stream("audit")))
    members, others, pairs = member_rows[places], rows[others], len(places)
    if pairs < LEAST:
        remedy = 'leave "target" out of audit.modes' if role == "target" else "audit.models = [] does without"
        raise DataError(
            f"{job.title}: {counted(len(labels), 'member')} and {counted(len(answers), 'non-member')} make "
            f"{counted(pairs, 'pair')} of one class, too few; {LEAST} are needed: more {role} images, or a test split "
            f"with the same classes; {remedy}"
        )
    head = round(HEAD_SHARE * pairs) if role == "source" and "reprobe" in job.settings.modes else 0
    attacked = slice(head, head + min(pairs - head, job.settings.images))
    parts = members[attacked], others[attacked], members[:head], others[:head]
    left_out = {"members_left_out": len(labels) - pairs, "others_left_out": len(answers) - pairs}
    left_out["classes_left_out"] = len(np.setxor1d(labels, answers))
    return Groups(*map(np.sort, parts)), {"pairs": pairs, **left_out, "copies": copies}


def say_left_out(experiment: Experiment, job: Job[Audit], matched: dict[str, int]) -> None:
    """Say it where much, or a class, is left out; matched: as `groups` returns it."""
    pairs, alone = matched["pairs"], matched["classes_left_out"]
    members, others = (pairs + matched[f"{side}_left_out"] for side in ("members", "others"))
    if alone or pairs < WORTH_SAYING * min(members, others):
        experiment.processes.say(
            f"{job.title}: {pairs} members and as many non-members are matched by class, of {members} and {others}: "
            f"the splits hold their classes in other shares, {alone} in one alone"
        )


def _head_state(experiment: Experiment, job: Job[Audit]) -> str:
    """What as-is attacks look through: a source head that was "trained", "never trained", or "fitted here".

    One that was fitted on the members, when `pre` or TL was adopted without one, tells of this fit and no network.
    """
    variant = experiment.recipe.dispose.get(job.model)
    before = [m for m in ("pre", "TL") if m in experiment.recipe.references and (m, job.model) != ("TL", "pre")]
    notes = (note for m in before for note in experiment.results.require(m)["notes"].get("weights", []))
    if not (variant and variant.new_heads) and any(note["kind"] == "fitted-head" for note in notes):
        state, seen = "fitted here", "the source head was fitted here; as-is attacks see that fit"
    elif not variant or not variant.new_heads or (variant.unlearn.trains_source_head and variant.lam != 0):
        return "trained"
    else:
        state, seen = "never trained", "the source head was never trained; as-is attacks see noise"
    if "as-is" in job.settings.modes:
        experiment.processes.say(f"{job.title}: {seen}")
    return state
