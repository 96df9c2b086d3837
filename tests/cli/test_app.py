"""Every command: what is the same whichever it is."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.mark.parametrize("words", ["check {}", "schema", "init quickstart"])
def test_the_main_process_alone_prints_the_result(recipe_file: Path, call, monkeypatch: pytest.MonkeyPatch, words: str):
    arguments = words.format(recipe_file).split()
    code, alone, _ = call(*arguments)
    assert code == 0 and alone
    monkeypatch.setenv("RANK", "0")
    assert call(*arguments)[1].splitlines()[:2] == alone.splitlines()[:2]  # `check` measures times too
    monkeypatch.setenv("RANK", "1")
    assert call(*arguments)[:2] == (0, "")
