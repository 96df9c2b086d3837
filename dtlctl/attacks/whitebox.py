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
    held, trained = (torch.from_numpy(np.concatenate(part)) for part in zip(*parts, strict=True))
    mine, theirs = ({name: torch.from_numpy(v).float() for name, v in group.items()} for group in (known.seen, seen))
    truth = torch.from_numpy(known.member).float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Network({name: values[trained] for name, values in mine.items()})
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, fused=True)
        best, best_state, since = float("inf"), copy.deepcopy(network.state_dict()), 0
        for _ in range(epochs):
            network.train()
            for rows in torch.from_numpy(rng.permutation(trained.numpy())).split(64):
                optimizer.zero_grad()
                F.binary_cross_entropy_with_logits(network(mine, rows), truth[rows]).backward()
                optimizer.step()
            check = F.binary_cross_entropy_with_logits(network.answers(mine, held), truth[held])
            since = 0 if check < best else since + 1
            if since == 0:
                best, best_state = float(check), copy.deepcopy(network.state_dict())
            elif since >= PATIENCE:
                break
    network.load_state_dict(best_state)
    scores, judged = network.answers(mine, held), network.answers(theirs, torch.arange(len(theirs["label"])))
    return Guess(scores.numpy(), known.member[held], judged.numpy())


class Network(nn.Module):
    """One small branch for each thing seen, joined by an encoder 256-128-64-1: rows of {name: [n, width]} -> [rows].

    trained: what is seen of the images that it will be trained on; all but the label is standardised as on these.
    """

    def __init__(self, trained: dict[str, Tensor], filters: int = 16):
        super().__init__()
        self.scales = {n: (v.mean(0), v.std(0, correction=0) + 1e-6) for n, v in trained.items() if n != "label"}
        widths = {name: values.shape[1] for name, values in trained.items()}
        self.classes = widths["logits"]
        self.filters = nn.Conv2d(1, filters, (1, widths["embedding"]))  # over one class's gradient at a time
        sizes = {**widths, "label": self.classes, "gradient": filters * self.classes}
        branches = {
            name: nn.Sequential(nn.Linear(size, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 64))
            for name, size in sizes.items()
        }
        self.branches = nn.ModuleDict(branches)
        layers: list[nn.Module] = []
        for before, after in ((64 * len(sizes), 256), (256, 128), (128, 64)):
            layers += [nn.Linear(before, after), nn.ReLU(), nn.Dropout(0.2)]
        self.encoder = nn.Sequential(*layers, nn.Linear(64, 1))

    def forward(self, seen: dict[str, Tensor], rows: Tensor) -> Tensor:
        seen = {name: values[rows] for name, values in seen.items()}
        label = F.one_hot(seen["label"][:, 0].long(), self.classes).float()
        error = seen["logits"].softmax(1) - label
        gradient = error[:, None, :, None] * seen["embedding"][:, None, None, :]
        found = {name: ((seen[name] - mean) / scale).clamp(-20, 20) for name, (mean, scale) in self.scales.items()}
        found |= {"label": label, "gradient": self.filters(gradient).relu().flatten(1)}
        return self.encoder(torch.cat([branch(found[name]) for name, branch in self.branches.items()], 1))[:, 0]

    @torch.no_grad()
    def answers(self, seen: dict[str, Tensor], rows: Tensor) -> Tensor:
        self.eval()
        return torch.cat([self(seen, part) for part in rows.split(256)])


def _stages(backbone: nn.Module) -> list[nn.Module]:
    """Where the attacker looks: the blocks of the stages that are known, else sequential children; at most six."""
    blocks = [block for stage in networks.stages(backbone) for block in stage.modules]
    known = [block for block in blocks if any(p.dim() > 1 for p in block.parameters())]
    found = known or [child for child in backbone.children() if isinstance(child, nn.Sequential)]
    if isinstance(backbone, networks.CifarResNet):
        found.insert(0, backbone.stem)
    return [found[int(place)] for place in np.linspace(0, len(found) - 1, min(len(found), MOST_STAGES))]
