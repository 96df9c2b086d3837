"""Settings that reach a run through its environment, where `accelerate launch` and `accelerate config` leave them."""

import os

from dtlctl.console import devices
from dtlctl.errors import RecipeError
from dtlctl.model.networks import Precision

_BARE = "every process holds the whole model; leave it out, and use more processes or a smaller batch_size"
REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": _BARE,
    "ACCELERATE_USE_FSDP": _BARE,
    "ACCELERATE_USE_MEGATRON_LM": _BARE,
    "ACCELERATE_USE_PARALLELISM_CONFIG": _BARE,
    "ACCELERATE_USE_SAGEMAKER": "SageMaker's own data parallelism is not supported; use torchrun or accelerate launch",
    "ACCELERATE_DYNAMO_BACKEND": "torch.compile has no double backward, which collisions need; leave it out",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "batch_size in the recipe is that of a step; leave it out",
    "ACCELERATE_GRADIENT_CLIPPING": "write clip in the recipe's stage instead",
}
"""What Accelerate would take from these variables and a recipe says otherwise, with what to do instead.

ACCELERATE_USE_CPU and ACCELERATE_CPU_AFFINITY are honoured, and ACCELERATE_TORCH_DEVICE where that is here.
"""
_PRECISIONS = {"bf16": "bfloat16", "no": None, "": None}


def check(precision: Precision) -> None:
    """Raise RecipeError for a variable that asks for what the recipe or this package does not do."""
    for name, remedy in REFUSED.items():
        value = os.environ.get(name, "").strip().lower()
        if value not in devices.OFF and (name, value) != ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1"):
            raise RecipeError(f"{name}={os.environ[name]} is set: {remedy}")
    mixed = os.environ.get("ACCELERATE_MIXED_PRECISION", "").strip().lower()
    if _PRECISIONS.get(mixed, mixed) not in (None, precision):
        wanted = 'write precision = "bfloat16" there' if mixed == "bf16" else "leave it out"
        raise RecipeError(
            f'ACCELERATE_MIXED_PRECISION={mixed} is set, but the recipe has precision = "{precision}": {wanted}'
            ", or launch with --mixed_precision no"
        )
    device, kind = os.environ.get("ACCELERATE_TORCH_DEVICE", "cpu"), devices.kind()
    if device.partition(":")[0] not in ("cpu", kind):
        raise RecipeError(f"ACCELERATE_TORCH_DEVICE={device} is set, which is no CPU and no accelerator that is here")
    if precision == "float64" and kind in devices.NO_FLOAT64:
        raise RecipeError(f'precision = "float64": {kind} has none; set ACCELERATE_USE_CPU=1, or another precision')
    if os.environ.get("NVIDIA_TF32_OVERRIDE") == "0" and precision == "tf32":
        raise RecipeError('NVIDIA_TF32_OVERRIDE=0 is set, but the recipe has precision = "tf32": unset it')
