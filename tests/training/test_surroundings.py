"""What the environment asks for is done, or refused by name before anything starts."""

from __future__ import annotations

import pytest
import torch

from dtlctl.errors import RecipeError
from dtlctl.training.engine import Engine

# As `accelerate launch` leaves them for a plain launch on several CPUs or GPUs, and harmless ones beside.
PLAIN = {
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_DYNAMO_BACKEND": "NO",
    "ACCELERATE_DYNAMO_MODE": "default",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False",
    "ACCELERATE_USE_CPU": "True",
    "ACCELERATE_USE_FSDP": "false",
    "ACCELERATE_USE_DEEPSPEED": "0",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
    "ACCELERATE_GRADIENT_CLIPPING": "none",
    "ACCELERATE_CPU_AFFINITY": "0",
    "ACCELERATE_TORCH_DEVICE": "cpu",
    "NVIDIA_TF32_OVERRIDE": "0",
}


@pytest.mark.parametrize(
    ("name", "value", "precision", "remedy"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", "float32", 'write precision = "bfloat16" there'),
        ("ACCELERATE_MIXED_PRECISION", "BF16", "tf32", 'the recipe has precision = "tf32"'),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "float32", "leave it out, or launch with --mixed_precision no"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "bfloat16", 'the recipe has precision = "bfloat16"'),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "float32", "leave it out"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "float32", "every process holds the whole model"),
        ("ACCELERATE_USE_FSDP", "True", "float32", "every process holds the whole model"),
        ("ACCELERATE_USE_FSDP", "1", "float32", "every process holds the whole model"),
        ("ACCELERATE_USE_MEGATRON_LM", "yes", "float32", "every process holds the whole model"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "float32", "every process holds the whole model"),
        ("ACCELERATE_USE_SAGEMAKER", "true", "float32", "torchrun or accelerate launch"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "float32", "no double backward"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "float32", "batch_size in the recipe is that of a step"),
        ("ACCELERATE_GRADIENT_CLIPPING", "1", "float32", "clip in the recipe"),
        ("ACCELERATE_TORCH_DEVICE", "mps", "float32", "no CPU and no accelerator"),
        ("NVIDIA_TF32_OVERRIDE", "0", "tf32", "unset it"),
        ("ACCELERATE_USE_CPU", "perhaps", "float32", "accelerate: invalid truth value perhaps"),
    ],
)
def test_what_a_run_would_not_do_is_refused_by_name(name, value, precision, remedy, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError) as caught:
        Engine(precision)
    message = str(caught.value)
    assert remedy in message and "\n" not in message
    assert message.startswith("accelerate: ") or f"{name}={value.lower()}" in message.replace(value, value.lower())


def test_what_a_plain_launch_sets_changes_nothing(monkeypatch):
    for name, value in PLAIN.items():
        monkeypatch.setenv(name, value)
    engine = Engine()
    assert engine.device == torch.device("cpu") and engine.accelerator.mixed_precision == "no"


def test_a_launcher_that_asks_for_the_recipe_s_own_precision_is_heard(monkeypatch):
    """And Accelerate adds no casts of its own to ours."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert Engine("bfloat16").accelerator.mixed_precision == "no"


def test_the_command_ends_with_one_line_and_code_2(call, recipe_file, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    code, _, err = call("pretrain", recipe_file)
    assert code == 2
    assert err.strip().splitlines()[-1].startswith("error: ACCELERATE_MIXED_PRECISION=fp16 is set, but the recipe has")
