"""Recipes to begin with, and what an editor gets to help with them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import typer.main

from dtlctl.cli.app import app
from dtlctl.recipe.overrides import tomllib
from dtlctl.recipe.schema import json_schema

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
PARTS = {path.stem: path.read_text(encoding="utf-8") for path in RECIPES}


def validator():
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed; it is in the extra `test`")
    jsonschema.Draft202012Validator.check_schema(json_schema())
    return jsonschema.Draft202012Validator(json_schema())


def test_shipped_recipes_are_listed_and_printed(call):
    code, out, err = call("init", "--list")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == [path.stem for path in RECIPES]
    code, out, err = call("init", "quickstart")
    assert (code, out, err) == (0, "#:schema ./dtlctl.schema.json\n" + PARTS["quickstart"], "")


@pytest.mark.parametrize("arguments", [(), ("quickstart", "--list"), ("quikstart",)])
def test_a_call_for_no_recipe_is_told(call, arguments: tuple[str, ...]):
    code, out, err = call("init", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: init: ")
    assert "'quickstart'" in err if arguments == ("quikstart",) else "--list" in err


@pytest.mark.parametrize(
    ("words", "offered"), [("dtlctl sc", "schema"), ("dtlctl init quickstart_f", "quickstart_full")]
)
def test_the_shell_completes_commands_and_shipped_recipes(words: str, offered: str):
    shell = {"_DTLCTL_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    code = "from dtlctl.cli.app import main; main()"
    environment = {**os.environ, **shell}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert said.stdout.split() == [offered]


@pytest.mark.parametrize("command", [None, *typer.main.get_command(app).commands])
def test_h_is_help_everywhere(call, command: str | None):
    code, out, _ = call(*filter(None, (command, "-h")))
    assert (code, "--help" in out) == (0, True)


def test_recipes_are_in_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    build = pytest.importorskip("hatchling.build", reason="hatchling is not installed; it builds the wheel")
    monkeypatch.chdir(ROOT)
    with zipfile.ZipFile(tmp_path / build.build_wheel(str(tmp_path))) as wheel:
        assert {f"dtlctl/recipes/{path.name}" for path in RECIPES} <= set(wheel.namelist())
        wheel.extractall(tmp_path / "site")
    code = "import json; from dtlctl.cli import tools; print(json.dumps([tools.__file__, tools.shipped()]))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), *sys.path])}
    said = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, check=True)
    assert json.loads(said.stdout) == [str(tmp_path / "site/dtlctl/cli/tools.py"), PARTS]


@pytest.mark.parametrize("text", PARTS.values(), ids=PARTS)
def test_the_schema_accepts_every_shipped_recipe(text: str):
    validator().validate(tomllib.loads(text))


@pytest.mark.parametrize(
    ("change", "is_valid"),
    [
        ("[target-only]\nsteps = 3", True),
        ("[data.piggyback.b]\nlike = 'target'\nfraction = 0.5", True),
        ("[data.piggyback.b]\nlike = 'neither'", False),
        ("[data.piggyback.b]\nfraction = 0.5", False),
        ("[data.piggyback.b]\npath = 'x'\nlikes = 'source'", False),
        ("[dispose.b]\nlambda = 1\nsteps = 3\nunlearn = { kind = 'uniform' }", True),
        ("[dispose.b]\nlambda = 1.5", False),
        ("[dispose.b]\nlam = 0.5", False),
        ("[dispose.b]\nunlearn = { kind = 'unifrom' }", False),
        ("[piggyback]\nattackers = [{ kind = 'probe', C = [1, 0.1] }]", True),
        ("[piggyback]\nattackers = [{ kind = 'probe', lr = [0.1] }]", False),
    ],
)
def test_the_schema_knows_what_loading_knows(change: str, is_valid: bool):
    text = "name = 'a'\n[data.source]\npath = 'builtin:letters'\n[data.target]\npath = 'builtin:digits'\n" + change
    assert validator().is_valid(tomllib.loads(text)) == is_valid


def test_the_schema_is_printed_and_explains_every_key(call):
    code, out, err = call("schema")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert document == json_schema()
    assert document["$schema"].endswith("2020-12/schema")
    for table in (document, *document["$defs"].values()):
        assert all("description" in node for key, node in table["properties"].items() if key != "kind")
