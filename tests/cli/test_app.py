"""Every command: what is the same whichever it is."""

from __future__ import annotations

import json
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


def test_a_sidecar_is_utf_8_whatever_the_locale(recipe_file: Path, call, monkeypatch: pytest.MonkeyPatch):
    """As in a locale of ASCII, with Python's UTF-8 mode off: there a text is ASCII unless its reader says otherwise."""
    assert call("pretrain", recipe_file, "--quiet")[0] == 0
    sidecar = recipe_file.parent / "runs" / "tiny" / "pretrain" / "model.json"
    document = json.loads(sidecar.read_text(encoding="utf-8"))
    sidecar.write_text(json.dumps({**document, "said": "λ"}, ensure_ascii=False), encoding="utf-8")
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, encoding="ascii", errors=None: read(path, encoding, errors))
    code, out, err = call("pretrain", recipe_file, "--quiet", "--json")
    assert (code, err) == (0, "") and json.loads(out)[0]["said"] == "λ"
