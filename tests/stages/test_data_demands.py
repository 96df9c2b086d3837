"""What a recipe demands of its network and its data is looked at before anything trains."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtlctl.data import cache
from dtlctl.data.sources import Source
from dtlctl.errors import RecipeError
from dtlctl.model import networks
from dtlctl.recipe import network_demands
from dtlctl.recipe.loading import load
from dtlctl.stages import data_demands

NULL = "dispose.null={steps=2, batch_size=%d, unlearn={kind='null-space', stages=%d}}"


def decode(recipe_file: Path) -> None:
    """What `check` looks at only if it has been decoded before."""
    recipe = load(recipe_file)
    for dataset in (recipe.data.source, recipe.data.target):
        for split in ("train", "test"):
            cache.load(Source(dataset), split, recipe.model.image_size)


def test_more_stages_than_the_network_has_end_every_command_before_data_is_read(
    call, recipe_file: Path, tmp_path: Path
):
    """A CIFAR ResNet has three; the dataset that is not there would end a command with 4."""
    changes = ("dispose.rand.fresh_stages=40", NULL % (64, 9), "data.source.path=./nowhere")
    expected = f"error: {recipe_file}: dispose.rand.fresh_stages: 40, but resnet8 has 3 stages; write 3 or less\n"
    expected += "also wrong: dispose.null.unlearn.stages: 9, but resnet8 has 3 stages; write 3 or less\n"
    for command in ("check", "pretrain", "run", "compare", "sweep"):
        words = [*(word for change in changes for word in ("--set", change)), *("--over", "seed=0,1")]
        found = call(command, recipe_file, *words[: None if command == "sweep" else -2])
        where = "error: seed=0: " if command == "sweep" else "error: "
        assert found == (2, "", expected.replace("error: ", where)), command
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arch", "stages", "wrong"),
    [
        ("resnet18", 4, ""),
        ("resnet18", 5, "dispose.null.unlearn.stages: 5, but resnet18 has 4 stages; write 4 or less"),
        ("vgg11_bn", 2, ""),
        (
            "vit_b_32",
            12,
            'piggyback.attackers.0: kind "renorm" needs batch normalisation, which vit_b_32 does not have',
        ),
        ("vgg11", 2, 'piggyback.attackers.0: kind "renorm" needs batch normalisation, which vgg11 does not have'),
        ("regnet_y_400mf", 5, "dispose.null.unlearn.stages: 5, but regnet_y_400mf has 4 stages; write 4 or less"),
    ],
)
def test_what_a_network_has_is_known_without_training(recipe_file: Path, arch: str, stages: int, wrong: str):
    """ResNet-18 has four stages, a vision transformer 12 layers and no batch normalisation; a RegNet has four."""
    recipe_file.write_text(recipe_file.read_text().replace('arch = "resnet8"\nwidth = 4', f'arch = "{arch}"'))
    changes = ("model={stem='imagenet', image_size=64}", NULL % (64, stages))
    recipe = load(recipe_file, [*changes, "piggyback.attackers=[{kind='renorm'}, {kind='last-block'}]"])
    if not wrong:
        network_demands.check(recipe, "FILE")
        return
    with pytest.raises(RecipeError) as caught:
        network_demands.check(recipe, "FILE")
    assert str(caught.value).startswith(f"FILE: {wrong}")


def test_a_network_whose_stages_are_not_known_is_refused_by_name(recipe_file: Path, monkeypatch):
    monkeypatch.setattr(networks, "stages", lambda backbone: [])
    recipe = load(recipe_file, [NULL % (64, 1), "piggyback.attackers=[{kind='last-block'}]"])
    reason = "dispose.null.unlearn.stages: the stages of resnet8 are not known"
    remedy = 'write unlearn = { kind = "random-labels" }, or take another network'
    with pytest.raises(RecipeError) as caught:
        network_demands.check(recipe, "FILE")
    other = 'kind "last-block" needs 2 known stages, which resnet8 does not have; leave it out'
    assert str(caught.value) == f"FILE: {reason}; {remedy}\nalso wrong: piggyback.attackers.0: {other}"


def test_more_target_classes_than_a_batch_can_tell_apart_are_said(call, recipe_file: Path):
    """Answers for ten digits have nine components, for which 27 images are needed."""
    said = "dispose/null: of the answers for 10 target classes the 8 leading components count with 26 images a step"
    decode(recipe_file)
    for images in (26, 27):
        code, _, err = call("check", "--decode", recipe_file, "--set", NULL % (images, 2))
        assert code == 0 and (f"{said}; 27 would keep all" in err) == (images == 26)


ATTACKER = "dispose.sim={steps=2, batch_size=%d, lambda=0.1, unlearn={kind='simulated-attacker', steps=4}}"


def test_a_batch_too_small_for_a_simulated_attacker_is_told_before_anything_trains(
    call, recipe_file: Path, tmp_path: Path, monkeypatch
):
    """Four steps and what judges them are five parts of two images: ten, on two processes twenty."""
    reason = "images a step; steps = 4 needs"
    few = "too few for simulated-attacker with"
    small = (2, "", f"error: {recipe_file}: dispose.sim.batch_size: {few} 8 {reason} 10 or more\n")
    assert call("run", recipe_file, "--quiet", "--set", ATTACKER % 8) == small
    decode(recipe_file)
    assert call("check", recipe_file, "--set", ATTACKER % 8) == small
    assert call("check", recipe_file, "--set", ATTACKER % 10)[0] == 0
    monkeypatch.setattr(data_demands, "equal_parts", lambda *_: {"source": 8})  # as of a source of 8 images
    source = f"error: {recipe_file}: data.source.fraction: {few} 8 {reason} 10 or more\n"
    assert call("run", recipe_file, "--quiet", "--set", ATTACKER % 64) == (2, "", source)
    monkeypatch.setattr(data_demands, "_sharing", lambda *_: 2)
    two = f"error: {recipe_file}: dispose.sim.batch_size: {few} 18 {reason} 20 or more\n"
    monkeypatch.setattr(data_demands, "equal_parts", lambda *_: {"source": 18})
    assert call("run", recipe_file, "--quiet", "--set", ATTACKER % 18) == (2, "", two)
    assert not list((tmp_path / "runs").rglob("model.json"))


def test_images_that_make_no_equal_chunks_are_told_before_anything_trains(call, recipe_file: Path, tmp_path: Path):
    """Eight chunks of two need 16 images; one of every digit is ten."""
    decode(recipe_file)
    changes = ["data.target.fraction=0.005", "dispose.gc.retain={kind='target-ce'}", "dispose.gc.batch_size=16"]
    words = [word for change in (*changes, "dispose.gc.unlearn.chunks=8") for word in ("--set", change)]
    reason = "dispose.gc: a step has 10 images of data.target: no 8 equal parts of 2 or more, for as many chunks"
    remedy = "make data.target.fraction larger, or take fewer chunks"
    expected = (2, "", f"error: {recipe_file}: {reason}; {remedy}\n")
    assert call("check", recipe_file, *words) == expected
    assert call("run", recipe_file, "--quiet", *words) == expected
    assert not list((tmp_path / "runs").rglob("model.json"))
    assert call("check", recipe_file, *words[:-2])[0] == 0  # in two chunks


def test_shares_of_processes_are_told_too_unless_the_result_is_there(opened, monkeypatch):
    """Twenty processes have one target image each; a result that was made on one needs none of them."""
    experiment = opened(
        "dispose.one.batch_size=40", "dispose.one.unlearn={kind='uniform'}", "dispose.one.retain={kind='target-ce'}"
    )
    (job,) = [job for job in experiment.jobs if job.path == "dispose/one/model.json"]
    experiment.data.index("target"), experiment.data.index("source")
    monkeypatch.setenv("WORLD_SIZE", "20")
    with pytest.raises(RecipeError, match=r"a step has 20 images of data.target: no 20 .* take fewer processes"):
        data_demands.check(experiment, [job])
    (experiment.folder / job.path).parent.mkdir(parents=True)
    (experiment.folder / job.path).touch()
    data_demands.check(experiment, [job])


def test_one_pass_of_a_network_that_cannot_is_told_before_data_is_read(call, recipe_file: Path):
    """A vision transformer has layer norms and attention."""
    recipe_file.write_text(recipe_file.read_text().replace('arch = "resnet8"\nwidth = 4', 'arch = "vit_b_32"'))
    changes = ("model={stem='imagenet', image_size=64}", "data.source.path=./nowhere")
    changes = (*changes, "dispose.gc.unlearn={kind='gradient-collision', chunks=2, memory='batched'}")
    words = [word for change in changes for word in ("--set", change)]
    reason = 'dispose.gc.unlearn.memory: "batched": vit_b_32 has other layers than convolutions, linear layers and '
    reason += 'batch norms; write "auto", "keep" or "recompute"'
    for command in ("check", "run"):
        assert call(command, recipe_file, *words) == (2, "", f"error: {recipe_file}: {reason}\n")


def test_an_audit_without_enough_images_ends_a_run_before_anything_trains(call, recipe_file: Path, tmp_path: Path):
    """Ten members make ten pairs at most; twenty are needed. `models = []` audits nobody."""
    few = ("--set", "data.source.fraction=0.01", "--set", "dispose={}")
    code, _, err = call("run", recipe_file, *few)
    assert code == 4 and "10 pairs of one class, too few" in err and "audit.models = []" in err
    assert not list((tmp_path / "runs").rglob("model.json"))
    assert load(recipe_file, ["audit.models=[]"]).audit_models == []
