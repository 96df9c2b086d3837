"""Attackers who know the weights, the image and its true label (Del Grosso et al., arXiv:2203.09481).

Per-image gradients of the cross-entropy, seen through a few numbers; and WB, the white-box attack of Nasr et al.
(arXiv:1812.00910): a network that is trained on all that the model does with the images whose membership is known.
Theirs has a branch for each kind of number; here they stand side by side. The model is in eval mode: no image's loss
depends on another image, and one backward pass has the gradients of a whole batch.
"""

import copy
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from dtlctl.attacks.features import pooled
from dtlctl.attacks.membership import Guess, Known
from dtlctl.attacks.signals import Observation, loss
from dtlctl.console import devices
from dtlctl.model import networks
from dtlctl.model.small_maps import unfold, unfoldable
from dtlctl.model.stages import hooked

CHUNK = 64
"""Images whose layers' inputs, a column for each place of a map, exist at a time."""
MOST_STAGES, EPOCHS, L2 = 6, 30, 10.0


def grad_x(view: Observation) -> dict[str, Tensor]:
    """Seven statistics [n, 7] of each image's gradient by its pixels in [0, 1]."""
    return {"grad-x": torch.cat([seven(by_pixels(view.module, x, y)) for x, y in view.batches])}


def grad_w(view: Observation) -> dict[str, Tensor]:
    """The norms [n, layers] of each image's gradient by the weights of every convolution and linear layer."""
    parts = (pair for x, y in view.batches for pair in zip(x.split(CHUNK), y.split(CHUNK), strict=True))
    return {"grad-w": torch.cat([by_weights(view.module, x, y) for x, y in parts])}


def by_pixels(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The gradient of each image's loss by its pixels, of the shape of x: [B, 3, S, S]; y: [B]."""
    if isinstance(model, networks.Classifier):
        model = copy.copy(model)  # of the same tensors
        model.precision = "float32"  # bfloat16 would round what tells images apart
    constant = {name: parameter.detach() for name, parameter in model.named_parameters()}
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = functional_call(model, constant, (x,))
        (found,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), x)
    return found


def by_weights(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Norms [B, layers] of each image's gradient by the weights of each layer, in the order of calls; no biases.

    Layers are those that are called with what is computed of the images: no positions, nor weights that a network
    multiplies by itself, as attention often does.
    """
    norms: list[Tensor] = []
    images, none = len(x), x.new_zeros(len(x))

    def watch(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not output.requires_grad:
            return
        place, given = len(norms), inputs[0].detach()
        norms.append(none)

        def keep(gradient: Tensor) -> None:
            norms[place] = _squares(layer, given, gradient, images).clamp(min=0).sqrt()

        output.register_hook(keep)  # sees the gradient by this output, also where an activation overwrites it

    with hooked((m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)), watch):
        by_pixels(model, x, y)
    return torch.stack(norms, 1)


def _squares(layer: nn.Module, inputs: Tensor, gradient: Tensor, images: int) -> Tensor:
    """The squared norm [images] of Σ_t g_t ⊗ a_t over places t: a what the layer multiplies, g the gradient there.

    Where places are few that is Σ_{t,u} (g_t · g_u) (a_t · a_u), the product of two Gram matrices, and costs less.
    """
    if isinstance(layer, nn.Conv2d) and not (unfoldable(layer) and type(layer).forward is nn.Conv2d.forward):
        return torch.stack([_one_square(layer, *one) for one in zip(inputs, gradient, strict=True)])
    if isinstance(layer, nn.Conv2d):  # [images * groups, taps, places] and [images * groups, outputs, places]
        a, g = (v.reshape(images * layer.groups, -1, v.shape[-1]) for v in (unfold(layer, inputs), gradient.flatten(2)))
    else:
        a, g = (v.reshape(images, -1, v.shape[-1]).mT for v in (inputs, gradient))
    taps, outputs, places = a.shape[1], g.shape[1], a.shape[2]
    few = places * (taps + outputs) < taps * outputs
    found = (a.mT @ a) * (g.mT @ g) if few else (g @ a.mT).square()
    return found.sum((1, 2)).view(images, -1).sum(1)


def _one_square(conv: nn.Conv2d, x: Tensor, gradient: Tensor) -> Tensor:
    """The same of one image, by torch: of a convolution that pads or treats its weight in a way of its own."""
    weight, bare = nn.Parameter(conv.weight.detach()), copy.copy(conv)
    bare._parameters = {**conv._parameters, "weight": weight}
    with torch.enable_grad():
        return torch.autograd.grad(bare.forward(x[None]), weight, gradient[None])[0].square().sum()


def seven(gradient: Tensor) -> Tensor:
    """L1, L2, L∞, mean, skewness, excess kurtosis and least magnitude of each image's numbers: [B, ...] to [B, 7].

    Skewness and excess kurtosis are those of scipy.stats (biased); both are 0 for a constant vector.
    """
    flat = devices.exact(gradient.flatten(1))  # fourth powers of small gradients leave the range of float32
    size, mean = flat.abs(), flat.mean(1)
    second, third, fourth = ((flat - mean[:, None]).pow(power).mean(1) for power in (2, 3, 4))
    spread = torch.where(second > 0, second, 1)
    kurtosis = torch.where(second > 0, fourth / spread**2 - 3, 0)
    norms = size.sum(1), torch.linalg.vector_norm(flat, dim=1), size.amax(1)
    return torch.stack([*norms, mean, third / spread**1.5, kurtosis, size.amin(1)], 1)


@torch.no_grad()
def observe(view: Observation) -> dict[str, Tensor]:
    """One row an image, [n, width], of numbers side by side.

    Spatial means of the stages, the embedding that the last linear layer takes, logits, what the loss changes in them
    (softmax - one-hot), the label as zeros and a one, the loss, and norms of the gradient by each layer's weights.
    """
    backbone = getattr(view.module, "backbone", view.module)
    last = [layer for layer in view.module.modules() if isinstance(layer, nn.Linear)][-1:]
    norms, means, rows = grad_w(view)["grad-w"], list[Tensor](), list[Tensor]()
    blocks = hooked(_stages(backbone), lambda layer, inputs, output: means.append(pooled(output, backbone)))
    embedding = hooked(last, lambda layer, inputs, output: means.append(pooled(inputs[0], backbone)))
    with blocks, embedding:
        for x, y in view.batches:
            means.clear()
            logits = view.module(x)
            label = F.one_hot(y, logits.shape[1])
            rows.append(torch.cat([*means, logits, logits.softmax(1) - label, label], 1))
    return {"wb": torch.cat([torch.cat(rows), loss(view)["loss"][:, None], norms], 1)}


def infer(known: Known, seen: dict[str, np.ndarray], seed: int) -> Guess:
    """scikit-learn's network of three layers. A fifth of either group that he knows is held out for the threshold."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import train_test_split
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer, StandardScaler

    warnings.filterwarnings("ignore", category=ConvergenceWarning)
    places = np.arange(len(known.member))
    trained, held = train_test_split(places, test_size=0.2, stratify=known.member, random_state=seed)
    clip = FunctionTransformer(np.clip, kw_args={"a_min": -20, "a_max": 20})
    size = min(64, len(trained))
    network = MLPClassifier((256, 128, 64), alpha=L2, batch_size=size, max_iter=EPOCHS, random_state=seed)
    score = make_pipeline(StandardScaler(), clip, network).fit(known.seen["wb"][trained], known.member[trained])
    scores, judged = (score.predict_proba(rows)[:, 1] for rows in (known.seen["wb"][held], seen["wb"]))
    return Guess(scores, known.member[held], judged)


def _stages(backbone: nn.Module) -> list[nn.Module]:
    """Where the attacker looks: the blocks of the stages that are known, else sequential children; at most six."""
    blocks = [block for stage in networks.stages(backbone) for block in stage.modules]
    known = [block for block in blocks if any(p.dim() > 1 for p in block.parameters())]
    found = known or [child for child in backbone.children() if isinstance(child, nn.Sequential)]
    if isinstance(backbone, networks.CifarResNet):
        found.insert(0, backbone.stem)
    return [found[int(place)] for place in np.linspace(0, len(found) - 1, min(len(found), MOST_STAGES))]
