"""Disposable transfer learning: pre-train, fine-tune, dispose of the source knowledge, and prove it with attacks.

For programs: `collide`, the gradient-collision loss of any PyTorch module, and `load`, an exported model. Both are
imported when they are first asked for: `import dtlctl` needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dtlctl.objectives.collision import collide
    from dtlctl.run.export import load

__version__ = "0.1.0"
__all__ = ["__version__", "collide", "load"]

_PLACES = {"collide": "dtlctl.objectives.collision", "load": "dtlctl.run.export"}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'dtlctl' has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)
