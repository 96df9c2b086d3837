"""WB: the white-box attack of Nasr et al. (arXiv:1812.00910), after Del Grosso et al. (arXiv:2203.09481).

The attacker knows the weights, the image and its true label. He trains a network on all that the model does with the
images whose membership he knows. Theirs has a branch for each kind of number; here they stand side by side. His
threshold comes from images of his that were not trained on, and nobody flips its sign by those that are judged.
"""

import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtlctl.attacks.features import pooled
from dtlctl.attacks.gradients import grad_w
from dtlctl.attacks.membership import Guess, Known
from dtlctl.attacks.signals import Observation, loss
from dtlctl.model import networks
from dtlctl.model.stages import hooked

MOST_STAGES, EPOCHS, L2 = 6, 30, 10.0


@torch.no_grad()
def observe(view: Observation) -> dict[str, Tensor]:
    """One row an image, [n, width], of numbers side by side.

    Spatial means of the stages, the embedding that the last linear layer takes, logits, what the loss changes in them
    (softmax - one-hot), the label as zeros and a one, the loss, and norms of the gradient by each layer's weights.
    """
    backbone = getattr(view.module, "backbone", view.module)
    last = [layer for layer in view.module.modules() if isinstance(layer, nn.Linear)][-1:]
    norms, means, rows = grad_w(view)["grad-w"], list[Tensor](), list[Tensor]()
    outputs = hooked(_stages(backbone), lambda module, inputs, output: means.append(pooled(output, backbone)))
    inputs = hooked(last, lambda module, inputs, output: means.append(pooled(inputs[0], backbone)))
    with outputs, inputs:
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
