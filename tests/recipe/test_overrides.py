"""A λ that was found goes into the recipe's file: one number and its comment change, and nothing else of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtlctl.errors import RecipeError
from dtlctl.recipe.overrides import tomllib, with_lambda, write_lambdas


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("[dispose.gc]\nlambda = 0.5\nlr = 1.0", "[dispose.gc]\nlambda = 0.25  # was 0.5\nlr = 1.0"),
        ("[dispose.gc]\r\nlambda=5e-1 # mine\r\n", "[dispose.gc]\r\nlambda=0.25 # mine  # was 5e-1\r\n"),
        ("[dispose.gc]\nlambda = 0.5  # was 0.3\n", "[dispose.gc]\nlambda = 0.25  # was 0.5\n"),
        ("dispose.gc.lambda = 1", "dispose.gc.lambda = 0.25  # was 1"),
        ('[dispose]\n"gc" = { "lambda" = 0.5, lr = 1 }', '[dispose]\n"gc" = { "lambda" = 0.25, lr = 1 }  # was 0.5'),
        ("\ufeff[dispose.a]\nlambda = 0.5\n[dispose.gc]\nlambda = 0.5 #\n# lambda = 0.5",
         "\ufeff[dispose.a]\nlambda = 0.5\n[dispose.gc]\nlambda = 0.25 #  # was 0.5\n# lambda = 0.5"),
        ("[dispose.gc]\nx = '''\nlambda = 0.5\n'''\nlambda = 0.5",
         "[dispose.gc]\nx = '''\nlambda = 0.5\n'''\nlambda = 0.25  # was 0.5"),
        ("dispose = {gc = {lambda = 0.5}, a = {lambda = 0.5}}",
         "dispose = {gc = {lambda = 0.25}, a = {lambda = 0.5}}  # was 0.5"),
        ("[dispose.gc]\nlambda = 0.25", "[dispose.gc]\nlambda = 0.25"),
    ],
)  # fmt: skip
def test_one_number_changes(before: str, after: str):
    assert with_lambda(before, "gc", 0.25) == after
    assert tomllib.loads(after.removeprefix("\ufeff"))["dispose"]["gc"]["lambda"] == 0.25


@pytest.mark.parametrize(
    "text",
    [
        "[dispose.gc]\nlr = 1.0", "", "dispose.gc.lambda = 0.5 x",
        '[dispose.gc]\n"lam\\u0062da" = 0.5', "dispose = {gc = {lambda = 0.5, x = '''\n'''}}",
    ],
)  # fmt: skip
def test_a_number_that_is_not_found_is_refused(text: str, tmp_path: Path):
    path = tmp_path / "r.toml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"r\.toml: λ cannot be written"):
        write_lambdas(path, {"gc": 0.25})
    assert path.read_text() == text


def test_the_file_keeps_its_mode_and_a_link_stays_a_link(tmp_path: Path):
    path, link = tmp_path / "r.toml", tmp_path / "l.toml"
    path.write_text("[dispose.gc]\nlambda = 0.5\n")
    path.chmod(0o640)
    link.symlink_to(path)
    write_lambdas(link, {"gc": 0.25}, dry=True)
    assert "0.25" not in path.read_text()
    write_lambdas(link, {"gc": 0.25})
    assert "0.25" in path.read_text() and link.is_symlink() and path.stat().st_mode & 0o777 == 0o640
