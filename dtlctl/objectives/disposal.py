"""Eq. 1 as one object: (1 − λ) · retain + λ · unlearn, by the `lam` and `number` that the caller sets before a step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torchvision.ops import StochasticDepth

from dtlctl.console import devices
from dtlctl.data.tensors import Batch
from dtlctl.model import networks
from dtlctl.model.batchnorm import BatchNorm
from dtlctl.objectives.retain import Retain
from dtlctl.objectives.step import GraphMode, Step, apart, choose, outputs
from dtlctl.objectives.unlearn import Unlearn


@dataclass(eq=False)
class Disposal:
    """The loss of a disposal step, of this process's share of the global batch.

    student, teacher: the network that is trained, from TL's weights or new, and TL, frozen, in eval mode. chunks: of
    this process. batch_norm: "train", or "frozen" for the running statistics of the start. images: rows of the source
    dataset; label_seed: of the labels that RAND draws for them. all_reduce sums tensors over `processes`. mode: how the
    chunks' graphs are held, chosen at the first step where the recipe does not say. number: of the step, for what an
    unlearning loss draws.
    """

    lam: float
    unlearn: Unlearn
    retain: Retain
    student: networks.Classifier
    teacher: networks.Classifier
    _: KW_ONLY
    chunks: int
    batch_norm: str
    images: int
    label_seed: int
    processes: int = 1
    all_reduce: Callable[[Sequence[Tensor]], list[Tensor]] = list
    mode: GraphMode | None = field(default=None, init=False)
    number: int = field(default=0, init=False)

    def __call__(self, source: Batch, target: Batch | None, unlearning: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """A scalar whose gradient, averaged over processes, is that of Eq. 1, and numbers to report, detached.

        target: for a retaining loss that needs one. unlearning: without it the scalar is the retaining loss alone.
        """
        train_mode(self.student, self.batch_norm)
        step = self._look(source, target)
        keep = self.retain.loss(step)
        parts = {
            "retain": keep.detach(),
            "source_loss": torch.stack([F.cross_entropy(one.source.detach(), one.y) for one in step.chunks]).mean(),
            "weight_norm": nn.utils.get_total_norm([p.detach() for p in step.parameters]),
        }
        if not unlearning:
            return keep, parts
        drive, value = self.unlearn.loss(step)
        total = (1 - self.lam) * keep + self.lam * self.retain.guard(drive, keep, step)
        return total, {**parts, "unlearn": value}

    @torch.no_grad()
    def source_loss_of_teacher(self, batches: Iterable[Batch]) -> float:
        """TL's source loss in nats on these global batches, as steps of this disposal would see it."""
        probe = copy.deepcopy(self.teacher)  # its running statistics move
        train_mode(probe, self.batch_norm)
        chunks = (pair for b in batches for pair in zip(b.x.chunk(self.chunks), b.y.chunk(self.chunks), strict=True))
        mean = torch.stack([F.cross_entropy(probe(x, "source"), y) for x, y in chunks]).mean()
        return float(self.all_reduce([mean])[0]) / self.processes

    def norms(self, source: Batch, target: Batch | None) -> tuple[float, float]:
        """Norms of the gradients of the retaining and of the unlearning loss; student and random numbers stay."""
        probe = self._probe()
        with devices.forked(source.x.device):
            step = probe._look(source, target)
            keep = self.retain.loss(step)
            drive = self.retain.guard(self.unlearn.loss(step)[0], keep, step)
        norms = [float(nn.utils.get_total_norm(step.gradient(scalar))) for scalar in (keep, drive)]
        return norms[0], norms[1]

    def cosine_to_float64(self, source: Batch) -> float:
        """Cosine of the unlearning loss's gradient, over all parameters, to the same in float64; without dropout."""
        gradients = []
        for exact in (False, True):
            probe = self._probe()
            if exact:
                x = devices.exact(source.x)
                probe.student.to(x.device).double().precision = "float64"
                source, probe.mode = Batch(x, source.y.to(x.device), source.rows), "recompute"
            for module in probe.student.modules():
                if isinstance(module, _DropoutNd | StochasticDepth):
                    module.eval()
            with networks.precision(probe.student.precision):
                step = probe._look(source, None)
                found = step.gradient(self.unlearn.loss(step)[0])
                gradients.append(torch.cat([devices.exact(g).flatten() for g in found]))
        ours, theirs = gradients
        return float(F.cosine_similarity(ours, theirs, dim=0))

    def _probe(self) -> Disposal:
        """The same with a copy of the student, whose running statistics may move."""
        probe = copy.copy(self)
        probe.student = copy.deepcopy(self.student)
        train_mode(probe.student, self.batch_norm)
        return probe

    def _look(self, source: Batch, target: Batch | None) -> Step:
        told = self.unlearn.memory
        self.mode = self.mode or (choose(self.student, source.x, self.chunks) if told == "auto" else told)
        seen, tape, again = outputs(self.student, source, self.chunks, self.mode, maps=self.unlearn.needs_maps)
        kept = apart(self.student, target, self.chunks) if target else ()
        parameters, more = list(self.student.parameters()), (self.processes, self.all_reduce, self.student, tape, again)
        return Step(seen, kept, self._answers, parameters, self.images, self.label_seed, *more, number=self.number)

    @torch.no_grad()
    def _answers(self, x: Tensor) -> Tensor:
        return self.teacher(x, "target")


def train_mode(model: nn.Module, batch_norm: str) -> None:
    model.train()
    if batch_norm == "frozen":
        for module in model.modules():
            if isinstance(module, BatchNorm):
                module.eval()
