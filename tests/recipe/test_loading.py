"""Every mistake in a recipe is one line that names the file, the key, the reason and the nearest valid name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dtlctl.errors import RecipeError
from dtlctl.recipe.loading import load
from dtlctl.recipe.plan import jobs
from dtlctl.recipe.schema import Recipe
from dtlctl.run.experiment import Experiment

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_shipped_recipe_loads_and_keeps_its_name(path: Path):
    recipe = load(path)
    assert recipe.name == path.stem
    assert Recipe.model_validate(recipe.resolved()) == recipe


def test_defaults_are_resolved(recipe_file: Path):
    recipe = load(recipe_file)
    assert recipe.piggyback_models == ["scratch", "TL", "gc"]
    assert recipe.audit_models == ["pre", "TL", "gc", "rand"]
    assert recipe.dispose["gc"].retain.kind == "distill"
    assert recipe.data.piggyback["again"].path == "builtin:digits"
    assert recipe.data.piggyback["again"].fraction == 0.03


def test_steps_of_epochs_drop_the_rest_of_an_epoch(recipe_file: Path):
    """5 epochs of 103 images in batches of 20 are 5 * (103 // 20) = 25 steps; of 7 images, 5 steps of one batch."""
    plan = load(recipe_file, ["pretrain={epochs=5, batch_size=20}"]).pretrain
    assert plan.total_steps(103) == 25
    assert plan.total_steps(7) == 5


def test_override_is_typed_like_the_file(recipe_file: Path):
    recipe = load(recipe_file, ["dispose.gc.lambda=0.25", "name=other", "data.source.augment=crop", "seed = 3"])
    assert (recipe.dispose["gc"].lam, recipe.name, recipe.data.source.augment, recipe.seed) == (
        0.25,
        "other",
        "crop",
        3,
    )


def test_an_override_of_the_kind_or_the_length_replaces_what_it_contradicts(recipe_file: Path):
    """The file says chunks = 2 and steps = 12; neither is a key of the uniform loss or goes with epochs."""
    recipe = load(recipe_file, ["dispose.gc.unlearn.kind=uniform", "pretrain.epochs=3"])
    assert recipe.dispose["gc"].unlearn.kind == "uniform"
    assert (recipe.pretrain.epochs, recipe.pretrain.steps) == (3, None)


def test_a_word_may_have_any_letter(recipe_file: Path):
    assert load(recipe_file, ["data.source.path=./\N{GRINNING FACE}"]).data.source.path == "./\N{GRINNING FACE}"


def test_an_override_may_add_a_variant(recipe_file: Path):
    recipe = load(recipe_file, ['dispose.new={steps=5, unlearn={kind="uniform"}}'])
    assert [job.model for job in jobs(recipe) if job.stage == "dispose"] == ["gc", "rand", "new"]


MISTAKES = {
    "finetune.lrr=0.1": "finetune.lrr: unknown key; did you mean 'lr'?",
    "dispose.gc.unlearn.chunk=2": "dispose.gc.unlearn.chunk: unknown key; did you mean 'chunks'?",
    "data.source.pth='x'": "data.source.pth: unknown key; did you mean 'path'?",
    "pretran.epochs=1": "pretran: unknown key; did you mean 'pretrain'?",
    "dispose.gc.lambda=1.5": "dispose.gc.lambda: Input should be less than or equal to 1 (it is 1.5)",
    "dispose.gc.lambda=-0.1": "dispose.gc.lambda: Input should be greater than or equal to 0 (it is -0.1)",
    "dispose.gc.lambda='x'": "dispose.gc.lambda: Input should be a valid number (it is 'x')",
    "dispose.gc.lambda=nan": "dispose.gc.lambda: Input should be a finite number (it is nan)",
    "dispose.gc.unlearn.chunks=3": "dispose.gc: unlearn.chunks = 3 does not divide batch_size = 8 (rest 2)",
    "dispose.gc.unlearn.chunks=8": "dispose.gc: a chunk would hold 1 image; 2 are needed",
    "dispose.gc.unlearn.chunks=1": "dispose.gc.unlearn.chunks: Input should be greater than or equal to 2 (it is 1)",
    "dispose.gc.unlearn.kind='uniformm'": "dispose.gc.unlearn: unknown kind 'uniformm'; did you mean 'uniform'?",
    "dispose.rand.retain={on='target'}": "dispose.rand.retain: the table needs a kind",
    "model.channels_last=true": "model: channels_last needs a width of 16 or more, not 4: torch crashes on narrower",
    "model.stem='smal'": "model.stem: 'smal' is not valid; did you mean 'small'?",
    "model.arch='resnet9'": "model: unknown architecture 'resnet9'; did you mean",
    "model.arch='vit_b_16'": "model: width belongs to the CIFAR ResNets",
    "data.source.path='builtin:leters'": "no builtin dataset 'leters'; did you mean 'letters'?",
    "data.piggyback.again.like='sauce'": 'data.piggyback.again.like: \'sauce\' is neither "source" nor "target"',
    "finetune={epochs=3, steps=3}": "finetune: give either epochs or steps, not both",
    "finetune.batch_size=1": "finetune.batch_size: Input should be greater than or equal to 2 (it is 1)",
    "data.target.fraction=0": "data.target.fraction: Input should be greater than 0 (it is 0)",
    "name='../x'": "name: a name is 1 to 64 of a-z A-Z 0-9 . _ - and starts with a letter or digit",
    "name='con'": "name: this name is reserved on Windows",
    "piggyback.models=['TLL']": "piggyback.models: unknown model 'TLL'; did you mean 'TL'?",
    "seed=-1": "seed: Input should be greater than or equal to 0 (it is -1)",
    "seed=1.5": "seed: Input should be a valid integer (it is 1.5)",
    "precision=float16": "precision: float16 needs its loss scaled, which a product of two gradients squares; use bfl",
    "precision=bf16": "precision: 'bf16' is not valid",
    "dispose.gc.unlearn.memory=kept": "dispose.gc.unlearn.memory: 'kept' is not valid; did you mean 'keep'?",
    "pretrain=3": "pretrain: Input should be a valid dictionary or instance of Pretrain (it is 3)",
    "audit.models=['TGT']": "audit.models: TGT never saw the source; there is nothing to infer",
    "dispose.tl.steps=5": "dispose.tl: the name belongs to a reference model; choose another",
    "audit.attacks=['los']": "audit.attacks.0: 'los' is not valid; did you mean 'loss'?",
    "audit.modes=['reprob']": "audit.modes.0: 'reprob' is not valid; did you mean 'reprobe'?",
    "audit.attacks=['rmia']": 'audit: the attack "rmia" and references > 0 belong together; give both or neither',
    "dispose.rand={init='fresh', fresh_stages=2}": 'dispose.rand: init = "fresh" starts everything anew; fresh_stages',
    "compare.seeds=[6, 5, 6]": "compare.seeds: 6 is there twice",
    "piggyback.attackers=[{kind='full', lrr=[0.1]}]": "attackers.0.lrr: unknown key; did you mean 'lr'?",
    "audit.references=3": "audit: references = 3 is odd; they are trained in pairs",
}


@pytest.mark.parametrize("change", MISTAKES)
def test_every_mistake_names_file_key_and_reason(recipe_file: Path, change: str):
    with pytest.raises(RecipeError) as caught:
        load(recipe_file, [change])
    message = str(caught.value)
    assert message.startswith(f"{recipe_file}: ")
    assert MISTAKES[change] in message
    assert message.count("\n") <= 1


def test_several_mistakes_are_all_named(recipe_file: Path):
    with pytest.raises(RecipeError, match=r"seed: .*\nalso wrong: finetune\.lr"):
        load(recipe_file, ["seed=-1", "finetune.lr=0"])


@pytest.mark.parametrize("override", ["seed", "=3", "a b=1", "seed..x=1"])
def test_an_override_that_is_none_is_refused(recipe_file: Path, override: str):
    with pytest.raises(RecipeError, match="--set"):
        load(recipe_file, [override])


def test_missing_and_broken_files_are_named(tmp_path: Path):
    with pytest.raises(RecipeError, match="cannot be read"):
        load(tmp_path / "none.toml")
    (tmp_path / "broken.toml").write_text("name = [")
    with pytest.raises(RecipeError, match=r"broken\.toml: not valid TOML"):
        load(tmp_path / "broken.toml")
    (tmp_path / "latin.toml").write_bytes(b"name = '\xe9'")
    with pytest.raises(RecipeError, match="cannot be read"):
        load(tmp_path / "latin.toml")


KEYS = st.sampled_from(
    ["name", "seed", "model", "data", "source", "path", "dispose", "gc", "unlearn", "kind", "like", "x"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(KEYS, VALUES, max_size=6))
def test_any_document_is_a_recipe_or_a_recipe_error(tmp_path: Path, document: dict):
    """Never another exception, whatever the document holds."""
    text = "\n".join(f"{key} = {_toml(value)}" for key, value in document.items())
    (tmp_path / "any.toml").write_text(text, encoding="utf-8")
    try:
        load(tmp_path / "any.toml")
    except RecipeError as error:
        assert str(error).count("\n") <= 1


def _toml(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps("" if value is None else value)


def test_seeds_share_a_pre_training_with_a_seed_of_its_own(recipe_file: Path):
    """Its random numbers and the source's subset are those of a run with that seed; the others' stay the run's."""

    def of(*overrides: str) -> tuple[dict, dict, list[int]]:
        lab = Experiment(load(recipe_file, list(overrides)), recipe_file.parent, quiet=True)
        pre, _, tl = (job.described(lab.recipe) for job in lab.jobs[:3])
        return pre, tl, [lab.seed(tag) for tag in ("pretrain/init", "subset/source", "subset/target")]

    zero, three = of("seed=0"), of("seed=3")
    shared = of("seed=3", "pretrain.seed=0")
    assert shared[0] == zero[0] != three[0]
    assert shared[1] == three[1]
    assert shared[2] == [*zero[2][:2], three[2][2]]


def test_what_does_not_change_a_result_does_not_make_it_stale(recipe_file: Path):
    """How memory is used changes nothing; bfloat16 does; float32 reads as results did that knew no precision."""

    def described(*overrides: str) -> dict:
        recipe = load(recipe_file, list(overrides))
        return next(job for job in jobs(recipe) if job.model == "gc").described(recipe)

    plain = described()
    assert described('dispose.gc.unlearn.memory="recompute"') == plain
    assert described("model.width=16", "model.channels_last=true") == described("model.width=16") != plain
    assert "precision" not in plain
    assert "fresh_stages" not in plain["settings"]  # nor fresh stages, where there are none
    assert described("dispose.gc.fresh_stages=2")["settings"] == {**plain["settings"], "fresh_stages": 2}
    bound = described("dispose.gc.unlearn.cosine=0.9")
    assert bound != plain  # its sidecar has the cosine
    assert described("precision=bfloat16", "dispose.gc.unlearn.cosine=0.9") == {**bound, "precision": "bfloat16"}
