"""Lint, formatting, types, and the budgets that keep the code legible."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from dtlctl.recipe.plan import STAGES

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "dtlctl").rglob("*.py"))


@pytest.mark.parametrize("command", ["ruff check .", "ruff format --check .", "mypy"])
def test_tools_find_nothing(command: str):
    result = subprocess.run(
        [sys.executable, "-m", *command.split()], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_keep_their_budgets(path: Path):
    """At most 300 lines a file and 60 a function."""
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 60, f"{node.name} is too long"


def test_stages_do_not_import_each_other():
    """Data flows downwards: a stage knows the experiment, never another stage."""
    for path in (ROOT / "dtlctl" / "stages" / f"{stage}.py" for stage in STAGES):
        text = path.read_text(encoding="utf-8")
        others = [stage for stage in (*STAGES, "runner") if f"dtlctl.stages.{stage}" in text]
        assert not others, path.name


def test_only_the_engine_knows_accelerate():
    users = {path.name for path in SOURCES if "import Accelerator" in path.read_text(encoding="utf-8")}
    assert users == {"engine.py"}


def test_nothing_unpickles():
    """A checkpoint that comes from a stranger can hold numbers and nothing else."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            code = ast.unparse(node) if isinstance(node, ast.Attribute | ast.Import | ast.ImportFrom) else ""
            for word in ("pickle", "torch.load", "torch.save", ".load_state", ".save_state"):
                assert word not in code.replace(".load_state_dict", ""), f"{path.name}: {code}"
