"""Every mistake in a recipe is one line that names the file, the key, the reason and the nearest valid name."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dtlctl.errors import RecipeError
from dtlctl.recipe.loading import load
from dtlctl.recipe.overrides import names_in
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
    assert [job.model for job in jobs(recipe) if job.stage == "piggyback"] == ["scratch", "TL", "gc"]
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


def test_blanks_around_a_value_are_not_part_of_it(recipe_file: Path):
    assert load(recipe_file, ["data.source.path = /no/photos 1 "]).data.source.path == "/no/photos 1"


def test_a_word_may_have_any_letter(recipe_file: Path):
    assert load(recipe_file, ["data.source.path=./\N{GRINNING FACE}"]).data.source.path == "./\N{GRINNING FACE}"


def test_an_override_may_add_a_whole_variant(recipe_file: Path):
    recipe = load(recipe_file, ['dispose.new={steps=5, unlearn={kind="uniform"}}'])
    assert [job.model for job in jobs(recipe) if job.stage == "dispose"] == ["gc", "rand", "new"]


THREE = ("dispose={gc={lambda=0.2}, 'r.v2'={lambda=0.75, steps=3, batch_size=8, unlearn={kind='uniform'}}, "
         "none={steps=9, batch_size=8, unlearn={kind='none'}}}")  # fmt: skip


def lambdas(recipe: Recipe) -> dict[str, float]:
    return {name: one.lam for name, one in recipe.dispose.items()}


@pytest.mark.parametrize("star", ["dispose.*.", " dispose . * ."])
def test_a_star_is_every_variant_with_an_unlearning_loss(recipe_file: Path, star: str):
    """rand and `r.v2` name their losses and gc has the file's; `none` has nothing that λ could weigh."""
    recipe = load(recipe_file, [THREE, f"{star}steps=20", f"{star}unlearn.kind=uniform", "dispose.gc.steps=7"])
    assert {name: one.steps for name, one in recipe.dispose.items()} == {"gc": 7, "rand": 20, "r.v2": 20, "none": 9}
    kinds = [one.unlearn.kind for one in recipe.dispose.values()]
    assert kinds == ["uniform", "uniform", "uniform", "none"]
    assert load(recipe_file, [f"{star}epochs=2"]).dispose["gc"].steps is None


def test_tables_that_a_star_sets_are_each_variants_own(recipe_file: Path):
    """Else the second change would be of both."""
    changes = ["dispose.*.retain={kind='distill', on='both'}", "dispose.gc.retain.on=target"]
    recipe = load(recipe_file, changes)
    assert [one.retain.model_dump()["on"] for one in recipe.dispose.values()] == ["target", "both"]


def test_a_factor_multiplies_the_odds_of_lambda(recipe_file: Path):
    """λ / (1 − λ): 1/4 and 3/1 at λ = 0.2 and 0.75; twice that is 1/2 and 6/1, so λ = 1/3 and 6/7.

    rand has the recipe's 0.1, 1/9: twice that is 2/9, λ = 2/11. Four times 1/4 is 1, λ = 0.5.
    """
    assert lambdas(load(recipe_file, [THREE, "dispose.*.odds=1"])) == lambdas(load(recipe_file, [THREE]))
    assert lambdas(load(recipe_file, [THREE, "dispose.*.odds=2"])) == pytest.approx(
        {"gc": 1 / 3, "rand": 2 / 11, "r.v2": 6 / 7, "none": 0.0}, abs=1e-6
    )
    for name in ('"r.v2"', "'r.v2'"):
        assert load(recipe_file, [THREE, f"dispose.{name}.odds=2"]).dispose["r.v2"].lam == pytest.approx(
            6 / 7, abs=1e-6
        )
    assert load(recipe_file, [THREE, "dispose.gc.odds=2", "dispose.*.odds=2"]).dispose["gc"].lam == 0.5
    assert load(recipe_file, [THREE, "dispose={gc={odds=4}}"]).dispose["gc"].lam == 0.5
    for odds, message in (("gc.odds=0", "above 0"), ("gc.odds=much", "above 0"), ("gc.odds=true", "above 0"),
                          (f"gc.odds=1{'0' * 400}", "above 0"), ("gc.odds=nan", "above 0"),
                          ("ngc.odds=2", "dispose.ngc: no such table; did you mean 'gc'"),
                          ("none.odds=2", "none has no unlearning loss")):  # fmt: skip
        with pytest.raises(RecipeError, match=message):
            load(recipe_file, [THREE, f"dispose.{odds}"])


@pytest.mark.parametrize("lam", [0, 0.0, 1, 1.0])
def test_lambda_at_an_end_has_no_odds_to_multiply(recipe_file: Path, lam: float):
    """λ / (1 − λ) is 0 or infinite: whatever it is multiplied by, λ stays, and a sweep would show one point as many."""
    with pytest.raises(RecipeError, match=f"gc.odds: 3 times the odds of lambda = {lam:g} comes to lambda = {lam:g}"):
        load(recipe_file, [f"dispose.gc.lambda={lam}", "dispose.*.odds=3"])


def test_a_star_that_is_nobody_or_holds_a_mistake_is_told(recipe_file: Path):
    nobody = 'dispose={gc={unlearn={kind="none"}}, rand={unlearn={kind="none"}}}'
    for changes, message in (
        ([nobody, "dispose.*.steps=20"], r"tiny.toml: dispose.\*.steps: no \[dispose.NAME\] table has an unlearning"),
        (["dispose.*.stepz=20"], "dispose.gc.stepz: unknown key; did you mean 'steps'"),
        (["dispose=3", "dispose.*.steps=20"], "no .* table has an unlearning loss"),
        (["dispose.gc.lambda=7", "dispose.*.odds=2"], "dispose.gc.lambda: .* less than or equal to 1"),
        (["dispose.gc.lambda=true", "dispose.gc.odds=2"], "dispose.gc.lambda: .* valid number"),
    ):
        with pytest.raises(RecipeError, match=message):
            load(recipe_file, changes)


def test_names_in_a_key_lose_their_quotes():
    assert names_in("data.piggyback.'a.b'.fraction") == ["data", "piggyback", "a.b", "fraction"]
    assert names_in(' dispose . "gc.v2" .odds') == ["dispose", "gc.v2", "odds"]


MISTAKES = {
    "finetune.lrr=0.1": "finetune.lrr: unknown key; did you mean 'lr'?",
    "dispose.gc.unlearn.chunk=2": "dispose.gc.unlearn.chunk: unknown key; did you mean 'chunks'?",
    "data.source.pth='x'": "data.source.pth: unknown key; did you mean 'path'?",
    "pretran.epochs=1": "pretran: unknown table; did you mean 'pretrain'?",
    "dispose.gc.lambda=1.5": "dispose.gc.lambda: Input should be less than or equal to 1 (it is 1.5)",
    "dispose.gc.lambda=-0.1": "dispose.gc.lambda: Input should be greater than or equal to 0 (it is -0.1)",
    "dispose.gc.lambda='x'": "dispose.gc.lambda: Input should be a valid number (it is 'x')",
    "dispose.gc.lambda=nan": "dispose.gc.lambda: Input should be a finite number (it is nan)",
    "dispose.gc.unlearn.chunks=3": "dispose.gc: unlearn.chunks = 3 does not divide batch_size = 8 (rest 2)",
    "dispose.gc.unlearn.chunks=8": "dispose.gc: a chunk would hold 1 image; 2 are needed",
    "dispose.gc.unlearn.chunks=1": "dispose.gc.unlearn.chunks: Input should be greater than or equal to 2 (it is 1)",
    "dispose.gc.unlearn.kind='uniformm'": "dispose.gc.unlearn: unknown kind 'uniformm'; did you mean 'uniform'?",
    "dispose.new={retain={on='target'}}": "dispose.new.retain: the table needs a kind",
    "model.channels_last=true": "model: channels_last needs a width of 16 or more, not 4: torch crashes on narrower",
    "model.stem='smal'": "model.stem: 'smal' is not valid; did you mean 'small'?",
    "model.arch='resnet9'": "model: unknown architecture 'resnet9'; did you mean",
    "model.arch='vit_b_16'": "model: width belongs to the CIFAR ResNets",
    "data.source.path='builtin:leters'": "no builtin dataset 'leters'; did you mean 'letters'?",
    "data.piggyback.again.like='sauce'": "data.piggyback.again.like: 'sauce' is not valid; did you mean 'source'?",
    "data.piggyback.again.like=['x']": "data.piggyback.again.like: ['x'] is not valid (valid: source, target)",
    "data.piggyback.new={lke='source'}": "data.piggyback.new.lke: unknown key; did you mean 'like'?",
    "data.sorce={path='x'}": "data.sorce: unknown table; did you mean 'source'?",
    "dispose.gc.unlern={kind='uniform'}": "dispose.gc.unlern: unknown table; did you mean 'unlearn'?",
    "dispose.unlearn={steps=3, stpes=3}": "dispose.unlearn.stpes: unknown key; did you mean 'steps'?",
    "dispose.gc.retain={kind='distill', tempreature=2}": "dispose.gc.retain.tempreature: unknown key; did you mean 'te",
    """dispose."a.b"={'l"r'=1}""": r"""dispose."a.b"."l\"r": unknown key; did you mean 'lr'?""",
    "target-only.stps=3": "target-only.stps: unknown key; did you mean 'steps'?",
    "data.piggyback.'a b'={like='source'}": 'data.piggyback."a b": a name is 1 to 64',
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
    "pretrain=3": "pretrain: it takes a table, not 3",
    "dispose.gc.unlearn=uniform": "dispose.gc.unlearn: it takes a table, not 'uniform'; write { kind = \"uniform\" }",
    "data.piggyback=[]": "data.piggyback: it takes a table, not []",
    "audit.models=['TGT']": "audit.models: TGT never saw the source; there is nothing to infer",
    "dispose.tl={steps=5}": "dispose.tl: the name belongs to a reference model; choose another",
    "audit.attacks=['los']": "audit.attacks.0: 'los' is not valid; did you mean 'loss'?",
    "audit.modes=['reprob']": "audit.modes.0: 'reprob' is not valid; did you mean 'reprobe'?",
    "audit.attacks=['rmia']": 'audit: "rmia" or "lira", and references > 0, belong together; give both or neither',
    "dispose.rand={init='fresh', fresh_stages=2}": 'dispose.rand: init = "fresh" starts everything anew; fresh_stages',
    "compare.seeds=[6, 5, 6]": "compare.seeds: 6 is there twice",
    "piggyback.attackers=[{kind='full', lrr=[0.1]}]": "attackers.0.lrr: unknown key; did you mean 'lr'?",
    "piggyback.models=scratch,TL": 'piggyback.models: it takes a list, as in models = ["scratch", "TL"]',
    "audit.attacks=loss": 'audit.attacks: it takes a list, as in attacks = ["loss"]',
    "dispose.gx.steps=5": "dispose.gx: no such table; did you mean 'gc'? (valid: gc, rand); a new one is written into",
    'dispose."g.x".unlearn.kind=uniform': 'dispose."g.x": no such table',
    "dispose.GC.steps=5": "dispose.GC: no such table; did you mean 'gc'?",
    "reference.x.weights='a'": "reference.x: no such table (valid: none); a new one",
    "data.source.test=[1]": "data.source.test: Input should be a valid string (it is [1])",
    "data.source.test.x=1": "data.source.test: Input should be a valid string (it is {'x': 1})",
    "data.piggyback.agian.fraction=0.1": "data.piggyback.agian: no such table; did you mean 'again'?",
    "dispose={gc={odds=2, lambda=0.3}}": "dispose.gc: odds and lambda say the same; give one of them",
    "dispose.gc.odds=1e9": "dispose.gc.odds: 1e+09 times the odds of lambda = 0.1 comes to lambda = 1; give lambda",
    "dispose.gc.odds=1e-324": "above 0",
    "dispose.GC={steps=5}": "dispose: 'gc' and 'GC' are one folder where case does not count; rename one of the two",
    "data.piggyback.Again={like='source'}": "data.piggyback: 'again' and 'Again' are one folder where case does not",
    "reference.x={weights=''}": "reference.x.weights: String should have at least 1 character (it is '')",
    "pretrain.weights=": "pretrain.weights: String should have at least 1 character (it is '')",
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
    with pytest.raises(RecipeError, match=r"seed: .*\nalso wrong: finetune\.lr: .* greater than 0"):
        load(recipe_file, ["seed=-1", "finetune.lr=0"])


def test_an_unknown_table_is_told_before_what_it_leaves_missing(recipe_file: Path):
    """Without [data.source], `like = "source"` copies nothing: that is no second mistake."""
    text = recipe_file.read_text().replace("[data.source]", "[data.sorce]").replace("lr = 0.02", "lr = 0")
    recipe_file.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load(recipe_file)
    assert str(caught.value) == (
        f"{recipe_file}: data.sorce: unknown table; did you mean 'source'? (valid: piggyback, source, target)\n"
        "also wrong: dispose.gc.lr: Input should be greater than 0 (it is 0); "
        "dispose.rand.lr: Input should be greater than 0 (it is 0)"
    )
    recipe_file.write_text(text.replace('like = "source"', 'like = "sorce"'))
    with pytest.raises(RecipeError, match=r"data\.sorce: .*\nalso wrong: data\.piggyback\.again\.like: .*; dispose"):
        load(recipe_file)


def test_a_mistake_is_not_told_again_where_it_is_copied(recipe_file: Path):
    recipe_file.write_text(recipe_file.read_text().replace('path = "builtin:digits"', 'pth = "builtin:digits"', 1))
    with pytest.raises(RecipeError) as caught:
        load(recipe_file)
    assert str(caught.value).startswith(f"{recipe_file}: data.source.pth: unknown key; did you mean 'path'?")
    assert "\n" not in str(caught.value)
    recipe_file.write_text(recipe_file.read_text().replace('pth = "builtin:digits"', 'path = "photos"', 1))
    with pytest.raises(RecipeError, match=r"data\.source: path 'photos' is no existing file or folder.*\)$"):
        load(recipe_file)


@pytest.mark.parametrize(
    ("override", "quoted"),
    [
        ("piggyback.models=[scratch,TL]", 'piggyback.models=["scratch","TL"]'),
        ("piggyback.models=['scratch', gc ]", 'piggyback.models=["scratch","gc"]'),
        ("piggyback.attackers=[{kind=full, lr=[1e-3, 1]}]", 'piggyback.attackers=[{kind="full", lr=[1e-3, 1]}]'),
        ("dispose.gc.unlearn={kind=uniform}", 'dispose.gc.unlearn={kind="uniform"}'),
    ],
)
def test_text_in_a_list_or_table_needs_no_quotes(recipe_file: Path, override: str, quoted: str):
    """A shell takes the quotes away."""
    assert load(recipe_file, [override]) == load(recipe_file, [quoted])


def test_a_list_that_quotes_cannot_mend_is_not_valid_toml(recipe_file: Path):
    for override in ("piggyback.models=[scratch,TL", "piggyback.models=[scr'atch]", "piggyback.models=[[]"):
        with pytest.raises(RecipeError, match="not valid TOML"):
            load(recipe_file, [override])


@pytest.mark.parametrize("override", [".=1", "a b=1", "dispose.*=[gc]"])
def test_a_key_that_is_none_is_not_mended_by_quotes_around_its_value(recipe_file: Path, override: str):
    with pytest.raises(RecipeError, match="not valid TOML"):
        load(recipe_file, [override])


def test_a_byte_order_mark_is_read_and_other_encodings_are_named(recipe_file: Path):
    text, recipe = recipe_file.read_text(), load(recipe_file)
    for blob in (text.encode("utf-8-sig"), text.replace("\n", "\r\n").encode("utf-8-sig")):
        recipe_file.write_bytes(blob)
        assert load(recipe_file) == recipe
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"):
        recipe_file.write_bytes(text.lstrip().encode(encoding))
        with pytest.raises(RecipeError, match=r"UTF-16 or UTF-32; save it as UTF-8$"):
            load(recipe_file)


@pytest.mark.parametrize("override", ["seed", "=3", "a b=1", "seed..x=1", "seed=1\nname='x'", "seed=1\r\n", "a\n=1"])
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
        experiment = Experiment(load(recipe_file, list(overrides)), recipe_file.parent, quiet=True)
        pre, _, tl = (job.described(experiment.recipe) for job in experiment.jobs[:3])
        return pre, tl, [experiment.recipe.stream(tag) for tag in ("pretrain/init", "subset/source", "subset/target")]

    zero, three = of("seed=0"), of("seed=3")
    shared = of("seed=3", "pretrain.seed=0")
    assert shared[0] == zero[0] != three[0]
    assert shared[1] == three[1]
    assert shared[2] == [*zero[2][:2], three[2][2]]


def test_what_does_not_change_a_result_does_not_make_it_stale(recipe_file: Path):
    """How memory is used changes nothing; bfloat16 does."""

    def described(*overrides: str) -> dict:
        recipe = load(recipe_file, list(overrides))
        return next(job for job in jobs(recipe) if job.model == "gc").described(recipe)

    plain = described()
    assert described('dispose.gc.unlearn.memory="recompute"') == plain
    assert described("model.width=16", "model.channels_last=true") == described("model.width=16") != plain
    assert plain["precision"] == "float32"
    assert described("dispose.gc.fresh_stages=2")["settings"] == {**plain["settings"], "fresh_stages": 2}
    bound = described("dispose.gc.unlearn.cosine=0.9")
    assert bound != plain  # its sidecar has the cosine
    assert described("precision=bfloat16", "dispose.gc.unlearn.cosine=0.9") == {**bound, "precision": "bfloat16"}


def test_a_key_of_thousands_of_parts_is_one_line(recipe_file: Path):
    recipe_file.write_text(".".join(["a"] * 5000) + " = 1\n" + recipe_file.read_text())
    with pytest.raises(RecipeError) as caught:
        load(recipe_file)
    # Python 3.13 gets past the depth, to the name.
    assert re.fullmatch(r".*/tiny\.toml: a( key is nested too deeply|: unknown table .*)", str(caught.value))


@pytest.mark.parametrize(
    ("network", "changes", "kind"),
    [
        ("resnet18", [], "gradient-collision"),
        ("resnet18", ["model.stem=imagenet", "model.image_size=64"], "null-space"),
        ("resnet18", ["model.stem=imagenet", "model.image_size=65"], "gradient-collision"),
        ("resnet50", ["model.stem=imagenet", "precision=bfloat16"], "null-space"),
        ("resnet50", ["model.stem=imagenet", "dispose.new.batch_size=30"], "null-space"),
        ("vgg11", ["model.stem=imagenet", "model.image_size=32"], "gradient-collision"),
        ("resnet18", ["model.stem=imagenet", "dispose.new.unlearn={kind='uniform'}"], "uniform"),
    ],
)
def test_an_empty_table_is_the_disposal_recommended_for_the_network(
    recipe_file: Path, network: str, changes: list[str], kind: str
):
    """In six passes over the source, and 1,200 steps where these are fewer, which is not asked of a given length."""
    text = recipe_file.read_text().replace('arch = "resnet8"\nwidth = 4', f'arch = "{network}"')
    recipe_file.write_text(re.sub(r"\[dispose.gc\].*?(?=\[piggyback\])", "[dispose.new]\n", text, flags=re.DOTALL))
    free = ["piggyback.models=['TL', 'new']", "audit.models=[]"]
    new = load(recipe_file, [*free, *changes]).dispose["new"]
    assert (new.unlearn.kind, new.price, new.init, new.lam) == (kind, 1.0, "fresh", None)
    assert [new.total_steps(n * new.batch_size) for n in (1, 10, 1000)] == [1200, 1200, 6000]
    given = load(recipe_file, [*free, *changes, "dispose.new.epochs=2"]).dispose["new"]
    assert [given.total_steps(n * given.batch_size) for n in (1, 1000)] == [2, 2000]
