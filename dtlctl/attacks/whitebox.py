"""WB: the white-box attack of Nasr et al. (arXiv:1812.00910), in the form of Del Grosso et al. (arXiv:2203.09481).

The attacker knows the weights, the image and its true label. He trains a network on hidden features, logits, loss,
label and last-layer gradient of the images whose membership he knows. Repaired against the public code: the branches
are registered and so trained, the network is in eval mode when it answers, nobody flips the sign of the score with the
help of the images that are judged, and the threshold comes from images of the attacker's that were not trained on.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtlctl.attacks.features import pooled
from dtlctl.attacks.membership import Guess, Known
from dtlctl.attacks.signals import Observation
from dtlctl.model import networks

MOST_STAGES, PATIENCE = 6, 10


@torch.no_grad()
def observe(view: Observation) -> dict[str, Tensor]:
    """Spatial means of the stages, the embedding, logits [n, K], loss [n, 1] and label [n, 1].

    The embedding is what the model's last layer takes, which must be linear; else TypeError.
    The gradient of the last layer's weight, [n, K, features], is (softmax - one-hot) ⊗ embedding; it is formed from
    these in batches, since all of it would not fit into memory.
    """
    model, backbone = view.module, getattr(view.module, "backbone", view.module)
    stages = _stages(backbone)
    last = [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1:]
    seen: list[dict[str, Tensor]] = []
    means: list[Tensor] = []
    embeddings: list[tuple[Tensor, Tensor]] = []
    hooks = [s.register_forward_hook(lambda _, __, out: means.append(pooled(out, backbone))) for s in stages]
    hooks += [s.register_forward_hook(lambda _, inputs, out: embeddings.append((inputs[0], out))) for s in last]
    try:
        for x, y in view.batches:
            means.clear()
            embeddings.clear()
            logits = model(x)
            if not embeddings or embeddings[-1][1] is not logits:
                raise TypeError("wb needs a model whose last layer is linear")
            embedding = embeddings[-1][0]
            found = {f"stage {number}": mean for number, mean in enumerate(means)}
            found |= {"embedding": embedding, "logits": logits, "label": y[:, None]}
            found["loss"] = F.cross_entropy(logits, y, reduction="none")[:, None]
            seen.append(found)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.cat([part[name] for part in seen]) for name in seen[0]}


def infer(known: Known, seen: dict[str, np.ndarray], seed: int, epochs: int = 100) -> Guess:
    """The attacker's network: BCE, Adam 1e-4, batch 64, at most 100 epochs.

    A fifth of either group that he knows is held out: the epoch with the smallest loss there is kept, after `PATIENCE`
    epochs without a better one he stops, and the threshold is fitted there.
    """
    rng = np.random.default_rng(seed)
    groups = [rng.permutation(np.flatnonzero(known.member == member)) for member in (True, False)]
    parts = [np.split(group, [max(1, round(len(group) / 5))]) for group in groups]
    held, trained = (np.concatenate(part) for part in zip(*parts, strict=True))
    scales = {n: (v[trained].mean(0), v[trained].std(0) + 1e-6) for n, v in known.seen.items() if n != "label"}
    mine, theirs = _tensors(known.seen, scales), _tensors(seen, scales)
    truth = torch.from_numpy(known.member).float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Network({name: values.shape[1] for name, values in mine.items()})
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, fused=True)
        best, best_state, since = float("inf"), copy.deepcopy(network.state_dict()), 0
        for _ in range(epochs):
            network.train()
            for rows in torch.from_numpy(rng.permutation(trained)).split(64):
                optimizer.zero_grad()
                F.binary_cross_entropy_with_logits(network(_at(mine, rows)), truth[rows]).backward()
                optimizer.step()
            check = F.binary_cross_entropy_with_logits(_answer(network, mine, torch.from_numpy(held)), truth[held])
            since = 0 if check < best else since + 1
            if since == 0:
                best, best_state = float(check), copy.deepcopy(network.state_dict())
            elif since >= PATIENCE:
                break
    network.load_state_dict(best_state)
    scores = _answer(network, mine, torch.from_numpy(held)).numpy()
    return Guess(scores, known.member[held], _answer(network, theirs, torch.arange(len(theirs["label"]))).numpy())


class Network(nn.Module):
    """One small branch for each input, joined by an encoder 256-128-64-1: {name: [B, width]} -> logits [B]."""

    def __init__(self, widths: dict[str, int], filters: int = 16):
        super().__init__()
        self.classes = widths["logits"]
        sizes = {**widths, "label": self.classes, "gradient": filters * self.classes}
        self.filters = nn.Conv2d(1, filters, (1, widths["embedding"]))  # over one class's gradient at a time
        self.branches = nn.ModuleDict({name: _branch(size) for name, size in sizes.items() if "raw" not in name})
        layers: list[nn.Module] = []
        for before, after in ((64 * len(self.branches), 256), (256, 128), (128, 64)):
            layers += [nn.Linear(before, after), nn.ReLU(), nn.Dropout(0.2)]
        self.encoder = nn.Sequential(*layers, nn.Linear(64, 1))

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        label = F.one_hot(inputs["label"][:, 0].long(), self.classes).float()
        # The logits were standardised for their own branch; the gradient needs them as they were.
        error = inputs["raw logits"].softmax(1) - label
        gradient = error[:, None, :, None] * inputs["raw embedding"][:, None, None, :]
        found = {**inputs, "label": label, "gradient": self.filters(gradient).relu().flatten(1)}
        return self.encoder(torch.cat([branch(found[name]) for name, branch in self.branches.items()], 1))[:, 0]


def _branch(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 64))


def _tensors(seen: dict[str, np.ndarray], scales: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, Tensor]:
    scaled = {n: np.clip((v - scales[n][0]) / scales[n][1], -20, 20) if n in scales else v for n, v in seen.items()}
    raw = {f"raw {name}": seen[name] for name in ("logits", "embedding")}
    return {name: torch.from_numpy(np.ascontiguousarray(v)).float() for name, v in {**scaled, **raw}.items()}


def _at(inputs: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    return {name: values[rows] for name, values in inputs.items()}


@torch.no_grad()
def _answer(network: Network, inputs: dict[str, Tensor], rows: Tensor) -> Tensor:
    network.eval()
    return torch.cat([network(_at(inputs, part)) for part in rows.split(256)])


def _stages(backbone: nn.Module) -> list[nn.Module]:
    """Where the attacker looks: the blocks of the stages that are known, else sequential children; at most six."""
    blocks = [block for stage in networks.stages(backbone) for block in stage.modules]
    known = [block for block in blocks if any(p.dim() > 1 for p in block.parameters())]
    found = known or [child for child in backbone.children() if isinstance(child, nn.Sequential)]
    if isinstance(backbone, networks.CifarResNet):
        found.insert(0, backbone.stem)
    if len(found) > MOST_STAGES:
        found = [found[int(place)] for place in np.linspace(0, len(found) - 1, MOST_STAGES)]
    return found
