"""Everything that can be said in a recipe or on the command line is documented, and what the documents say is true."""

from __future__ import annotations

import importlib
import itertools
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main

from dtlctl.cli.app import app
from dtlctl.errors import RecipeError
from dtlctl.recipe.loading import load
from dtlctl.recipe.plan import jobs
from dtlctl.recipe.schema import Recipe
from dtlctl.run.experiment import Experiment

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PAGES = [
    p for p in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))) if p.exists()
]
SCHEMA = Recipe.model_json_schema(by_alias=True)
MODELS = {**SCHEMA["$defs"], "Recipe": SCHEMA}
ATTACKERS = MODELS["Piggyback"]["properties"]["attackers"]["items"]["discriminator"]["mapping"]
KINDS = [k for loss in ("unlearn", "retain") for k in MODELS["Dispose"]["properties"][loss]["discriminator"]["mapping"]]
CLI = typer.main.get_command(app)
# A recipe to which the fragments in the documents are added.
BASE = {"name": "base", "data": {"source": {"path": "builtin:letters"}, "target": {"path": "builtin:digits"}}}


def page(path: str | Path) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """The fenced code of that language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def prose(text: str) -> str:
    """A page without its fenced code."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def in_backticks(text: str) -> set[str]:
    return set(re.findall(r"`([^`\n]+)`", prose(text)))


def everywhere(language: str) -> list[Any]:
    """Every code block of that language in all pages, as parameters of a test."""
    return [pytest.param(b, id=f"{p.stem}-{n}") for p in PAGES for n, b in enumerate(blocks(page(p), language))]


LIMITS = {"README.md": 700, "docs/tutorial.md": 2000, "docs/recipe.md": 10**6}
"""Words of a page, code and tables too; 1,200 for any other. The reference is written from the schema."""


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_pages_keep_to_their_words(path: Path):
    most = LIMITS.get(str(path.relative_to(ROOT)), 800 if path.parent.name == "results" else 1200)
    assert len(path.read_text(encoding="utf-8").split()) <= most


# The recipe --------------------------------------------------------------------------------------------------------


def test_the_recipe_reference_is_the_schema(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    reference = importlib.import_module("reference")
    now = page("docs/recipe.md")
    assert reference.page(now) == now, "run: python docs/reference.py"
    head, *_ = now.partition(reference.MARK)
    assert len(prose(head).split()) <= 500
    keys = {key for model in MODELS.values() for key in model["properties"]} - {"kind"}
    assert set(re.findall(r"^\| `([\w-]+)` \|", now, re.MULTILINE)) == keys


@pytest.mark.parametrize("model", sorted(MODELS))
def test_every_table_and_key_is_described(model: str):
    assert MODELS[model]["description"]
    for key, node in MODELS[model]["properties"].items():
        assert key == "kind" or len(node.get("description", "")) > 8, f"{model}.{key}: say below the field what it is"


def test_every_kind_is_explained():
    assert not set(ATTACKERS) - in_backticks(page("docs/attacks.md"))
    spans = " ".join(in_backticks(page("docs/losses.md")))
    for kind in KINDS:
        assert kind in re.findall(r"[\w-]+", spans), f"docs/losses.md does not explain {kind}"


def merge(base: dict, changes: dict) -> dict:
    both = {k: merge(base[k], v) for k, v in changes.items() if isinstance(v, dict) and isinstance(base.get(k), dict)}
    return {**base, **changes, **both}


@pytest.mark.parametrize("block", everywhere("toml"))
def test_recipes_in_the_documents_load(block: str, tmp_path: Path):
    """A block with a name is a whole recipe; another one is a part, valid in a recipe that lacks nothing else."""
    document = tomllib.loads(block)
    if "name" not in document:
        block = "\n".join(f"{key} = {inline(value)}" for key, value in merge(BASE, document).items())
    file = tmp_path / "recipe.toml"
    file.write_text(block, encoding="utf-8")
    load(file)


def inline(value: Any) -> str:
    """A TOML value on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {inline(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(inline, value)) + "]"
    return json.dumps(value)


# The command line --------------------------------------------------------------------------------------------------


def options() -> list[Any]:
    top = [(CLI, CLI.make_context("dtlctl", [], resilient_parsing=True))]
    every = top + [(c, c.make_context(n, [], resilient_parsing=True)) for n, c in CLI.commands.items()]
    return sorted({o for c, context in every for p in c.get_params(context) for o in p.opts if o.startswith("--")})


@pytest.mark.parametrize("word", [*sorted(CLI.commands), *options()])
def test_every_command_and_option_is_mentioned(word: str):
    text = "\n".join(map(page, PAGES))
    said = in_backticks(text) | {line for block in blocks(text, "sh") for line in block.splitlines()}
    assert any(re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", s) for s in said), f"{word} is documented nowhere"


def calls(block: str) -> list[list[str]]:
    """The arguments of every call of dtlctl in shell code, however it is launched; `$s` stands for 0."""
    found = []
    for line in block.replace("\\\n", " ").replace("$s", "0").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";|&<>")
        lexer.whitespace_split = True
        for is_end, words in itertools.groupby(lexer, lambda word: set(word) <= set(";|&<>")):
            command = [] if is_end else list(words)
            place = command.index("dtlctl") if "dtlctl" in command else None
            if place is not None and (command[:place] in ([], ["do"]) or command[place - 1] == "-m"):
                found.append(command[place + 1 :])
    return found


def test_calls_are_found():
    shell = "for s in 1 2; do dtlctl run a.toml --set seed=$s; done\ntorchrun -m dtlctl check b.toml | cat\necho dtlctl"
    assert calls(shell) == [["run", "a.toml", "--set", "seed=0"], ["check", "b.toml"]]


@pytest.mark.parametrize("block", everywhere("sh"))
def test_shell_lines_name_existing_commands_options_and_recipes(block: str, monkeypatch: pytest.MonkeyPatch):
    """Parsed by the command line's own parser; a shipped recipe must load with the line's --set."""
    monkeypatch.chdir(ROOT)
    known = {o for p in CLI.params for o in p.opts} | {"--help"}
    for arguments in calls(block):
        before = list(itertools.takewhile(lambda word: word.startswith("-"), arguments))
        assert known.issuperset(before), arguments
        if "--help" in arguments or len(arguments) == len(before):
            continue
        name, *rest = arguments[len(before) :]
        assert name in CLI.commands, f"dtlctl {name}: no such command"
        given = CLI.commands[name].make_context(name, rest).params
        if "recipe" in given and given["recipe"].parts[0] == "recipes" and not is_mistake(block):
            load(given["recipe"], list(given["overrides"] or []))


def mistakes() -> list[tuple[str, str]]:
    """Shell code in the recipe reference with the error that it is said to print."""
    return re.findall(r"^```sh\n([^`]*)```\n\n```text\nerror: ([^`]*)\n```$", page("docs/recipe.md"), re.MULTILINE)


def is_mistake(block: str) -> bool:
    return block in [code for code, _ in mistakes()]


def test_error_messages_are_quoted_as_they_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(ROOT)
    assert len(mistakes()) >= 3
    for code, message in mistakes():
        ((_, recipe, *rest),) = calls(code)
        with pytest.raises(RecipeError) as error:
            Experiment(load(Path(recipe), rest[1::2]), tmp_path, source=recipe)
        assert str(error.value) == message


# Code, files, links ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["docs/losses.md", "docs/extending.md"])
def test_python_in_the_documents_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The blocks of a page run one after the other, as a reader would paste them."""
    monkeypatch.chdir(tmp_path)
    code = blocks(page(name), "python")
    assert code
    scope: dict[str, Any] = {"__name__": "document"}
    for number, block in enumerate(code):
        exec(compile(block, f"{name}, block {number}", "exec"), scope)


def expand(path: str) -> list[str]:
    """`a/{b,c}` as the shell expands it."""
    parts = [part.strip("{}").split(",") for part in re.findall(r"\{[^}]*\}|[^{}]+", path)]
    return ["".join(choice) for choice in itertools.product(*parts)]


def test_the_tutorial_shows_the_files_of_the_quickstart():
    _, _, rest = page("docs/tutorial.md").partition("<!-- tree: quickstart -->")
    shown = [path for line in blocks(rest, "text")[0].splitlines()[1:] for path in expand(line.strip())]
    plan = [job.path for job in jobs(load(ROOT / "recipes/quickstart.toml"))]
    weights = [path.replace(".json", ".safetensors") for path in plan if path.endswith("model.json")]
    figures = (
        "piggyback",
        *(f"{kind}-{name}" for kind in ("tradeoff", "steps") for name in ("letters", "greek")),
        "roc",
    )
    report = [
        "table.md",
        "table.json",
        "report.html",
        "audit.md",
        "verdict.json",
        *(f"{name}.{form}" for name in figures for form in ("png", "svg")),
    ]
    assert sorted(shown) == sorted(["recipe.json", *plan, *weights, *(f"report/{name}" for name in report)])


def test_every_field_of_a_sidecar_is_in_the_tutorial(recipe_file: Path, call):
    code, out, err = call("pretrain", recipe_file, "--set", "pretrain.steps=1", "--quiet")
    assert code == 0, err
    sidecar = json.loads((recipe_file.parent / out.strip()).read_text())
    _, _, section = page("docs/tutorial.md").partition("## Read a sidecar")
    rows = [line.split("|")[1] for line in section.split("\n## ")[0].splitlines() if line.startswith("| `")]
    assert set(sidecar) == {name for row in rows for name in re.findall(r"`(\w+)`", row)}


def slugs(text: str) -> set[str]:
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_links_lead_somewhere(path: Path):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page(path))):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        goal = (path.parent / name).resolve() if name else path
        assert goal.exists(), f"{path.name}: {link}"
        if anchor:
            assert anchor in slugs(page(goal)), f"{path.name}: {link}"


def test_nothing_is_left_to_do():
    for path in (p for p in (ROOT / "docs").rglob("*") if p.suffix in {".md", ".json", ".toml", ".svg"}):
        assert "TODO" not in path.read_text(encoding="utf-8"), path
