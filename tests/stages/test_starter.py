"""The recipe that `dtlctl init` writes for somebody's folders: it loads, fits the machine, and runs as it is."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file

from dtlctl.data.sources import Source
from dtlctl.errors import CheckpointError, DataError, RecipeError
from dtlctl.model import networks
from dtlctl.recipe import network_demands
from dtlctl.recipe.loading import load
from dtlctl.recipe.overrides import tomllib
from dtlctl.recipe.schema import Recipe
from dtlctl.report import figures
from dtlctl.stages import costs, starter


def images(
    root: Path, classes: int, train: int, test: int, size: tuple[int, int] = (20, 28), split: str = "test"
) -> Path:
    """A folder of noise: so many images of every class in both splits."""
    random = np.random.default_rng(0)
    for name, count in (("train", train), (split, test)):
        for label in range(classes):
            folder = root / name / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 256, (size[1], size[0]), np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch):
    """Set how long an image takes: every network the same, in training and disposal."""

    def takes(seconds: float) -> None:
        fake = SimpleNamespace(image=lambda variant="": np.array([seconds, 2 * seconds]), features=8, stages=1)
        monkeypatch.setattr(starter, "Clock", lambda _: fake)

    monkeypatch.setattr(costs, "FORWARD", 0.0)  # what attackers look at, and fit, is not counted
    monkeypatch.setattr(costs, "_fit", lambda *_: 0.0)
    takes(1e-4)
    return takes


def written(folder: Path, *arguments: object) -> Recipe:
    options: dict[str, Any] = {
        "attacker": None,
        "weights": None,
        "arch": None,
        "size": None,
        "name": None,
        "minutes": 30,
        "quiet": True,
    }
    options |= dict(zip(options, arguments, strict=False))
    text = starter.write(str(folder / "s"), str(folder / "t"), **options)
    (folder / "recipe.toml").write_text(text)
    return load(folder / "recipe.toml")


def test_what_init_prints_is_checked_and_run_as_it_is(call, clock, tmp_path: Path, monkeypatch):
    images(tmp_path / "my photos", 3, 12, 7, split="valid")
    (tmp_path / "my photos/train/class0/notes.txt").write_text("x")
    images(tmp_path / "products", 2, 10, 4)
    code, out, err = call("init", "--source", "my photos", "--target", "products", "--size", 8, "--quiet")
    assert (code, err) == (0, "")
    assert out.startswith("#:schema ./dtlctl.schema.json\n")
    assert "36 training images of 3 classes, 12 of each; 21 test images; 20x28 pixels, L" in out
    assert "notes.txt" in out
    assert "not used, as neither split" not in out  # both are, under the names that they have
    # The lengths alone are cut: this is about what goes with what, not about learning.
    quick = re.sub(r"\b(epochs|steps) = \d+", r"\1 = 4", out)
    quick = quick.replace('"resnet20"', '"resnet8"\nwidth = 4').replace("channels_last = true", "")
    (tmp_path / "mine.toml").write_text(quick)
    recipe = load(tmp_path / "mine.toml")
    assert recipe.name == "my-photos-products"
    assert (recipe.data.source.path, recipe.data.source.test) == ("./my photos", "valid")
    code, plan, err = call("check", "mine.toml")
    assert (code, err) == (0, "")
    assert "36 images, 3 classes" in plan
    monkeypatch.setattr(figures, "save", lambda *_: [])  # half of the time, and tested elsewhere
    code, table, err = call("run", "mine.toml", "--quiet")
    assert code == 0, err  # noise cannot show that anything is better than TGT, which keeps to the limits
    assert "| gc " in table


def test_an_attacker_with_few_images_chooses_on_test_images_where_there_are_ten_of_every_class(clock, tmp_path: Path):
    images(tmp_path / "s", 2, 12, 10)
    images(tmp_path / "t", 2, 6, 1)
    assert written(tmp_path).piggyback.choose_on == "test"
    next((tmp_path / "s/test/class1").iterdir()).unlink()
    assert written(tmp_path).piggyback.choose_on == "own"


@pytest.mark.parametrize(("arch", "stem"), [("resnet18", "imagenet"), ("resnet34", "small"), ("resnet20", "small")])
def test_weights_say_which_network_they_are_of(clock, tmp_path: Path, arch: str, stem: str):
    images(tmp_path / "s", 2, 4, 1)
    images(tmp_path / "t", 2, 6, 1)
    file = tmp_path / "pre.safetensors"
    with pytest.raises(CheckpointError, match="does not exist"):
        written(tmp_path, None, str(file))
    save_file(networks.build(arch, {}, stem=stem).backbone.state_dict(), file)
    recipe = written(tmp_path, None, str(file))
    assert (recipe.model.arch, recipe.model.stem, recipe.pretrain.weights) == (arch, stem, str(file))
    save_file({"conv1.weight": torch.zeros(3)}, file)
    with pytest.raises(CheckpointError, match="do not fit resnet18"):
        written(tmp_path, None, str(file))


def test_lengths_follow_the_machine(clock, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """1,000 images of 2 classes, 20 x 28: 16 pixels fit. Image passes, at a quicker and quicker machine:

    fine-tuning twice, max(60, 100/2) = 60 steps of 64, of 80 images: 7,680. Three models: 150 steps of 40 images (2 x
    20), three trainings of `full` and two of `renorm`, each again 150 steps of 40: 6 x 6,000 = 36,000 a model: 108,000.
    An epoch: 1000 // 64 = 15 steps of 64 = 960; 1,200 steps of disposal: 76,800.
    """
    images(tmp_path / "s", 2, 500, 1)
    images(tmp_path / "t", 2, 50, 1)
    clock(0.001)  # 1,080,000 images, of which four models' attackers take 144,000: room for a second disposal
    assert [*written(tmp_path).dispose] == ["gc", "rand"]
    why = "a second variant beside it, by another loss, does not fit into 30 minutes"
    assert why not in (tmp_path / "recipe.toml").read_text()
    clock(0.003)  # 18 minutes are 360,000 images: (360,000 - 115,680 - 76,800) / 960 = 174 epochs
    recipe = written(tmp_path)
    assert (recipe.model.arch, recipe.model.image_size, recipe.pretrain.epochs) == ("resnet20", 16, 40)
    assert (recipe.dispose["gc"].steps, recipe.data.source.fraction) == (1200, 1)  # 76.8 passes: no fewer steps
    assert recipe.data.piggyback["source"].fraction == 0.04  # a twentieth, at most 20 of each class
    assert [one.steps for one in recipe.piggyback.attackers[:2]] == [150, 150]
    text = (tmp_path / "recipe.toml").read_text()
    assert why in text and [*recipe.dispose] == ["gc"]
    assert "takes 12 to 23 min" in text  # (192,480 + 40 * 960) images at 0.003 and 0.006 s: 11.5 and 23.1
    clock(0.02)  # 54,000 images: a third are 25 steps of attackers; with 30 they see 21,600; so the smaller network
    recipe = written(tmp_path)  # 24,720 are left; half of them are 193 steps, 12,352; (24,720 - 12,352) / 960 = 12.9
    assert (recipe.model.arch, recipe.pretrain.epochs, recipe.data.source.fraction) == ("resnet8", 12, 1)
    assert (recipe.dispose["gc"].steps, recipe.piggyback.steps, recipe.piggyback.attackers[1].steps) == (193, 30, 30)
    clock(0.6)  # 1,800 images, of them a quarter for this: 450 / (2 * 960 + 1,000) = 0.154 passes where 4 are the least
    assert capsys.readouterr().err == ""
    recipe = written(tmp_path, None, None, None, None, None, 30, False)
    assert (recipe.pretrain.epochs, recipe.data.source.fraction, recipe.dispose["gc"].steps) == (8, 0.039, 3)
    assert "3 steps of disposal fit" in capsys.readouterr().err
    assert recipe.data.piggyback["source"].balance == "classes"
    clock(0.02)  # 60 minutes are 108,000 images: attackers need no more than a third with 49 steps (35,280 images)
    recipe = written(tmp_path, None, None, None, None, None, 60)
    assert recipe.piggyback.steps == 50 and recipe.dispose["gc"].steps > 193


@pytest.mark.parametrize(
    ("room", "fraction", "epochs", "steps"),
    [
        (60_000.0, 1.0, 40, 6_000),  # all that is recommended, and no more than 40 epochs
        (26_000.0, 1.0, 23, 6_000),  # 26,000 / (2 * 600 + 1,000 * 2) = 8.1; what six passes leave: 23.3
        (16_000.0, 1.0, 10, 5_000),  # 5 passes, 10,000 s; 6,000 s of pre-training
        (6_400.0, 0.5, 8, 2_000),  # 2 passes: half of the images four times
    ],
)
def test_the_disposal_comes_before_more_pre_training(room: float, fraction: float, epochs: int, steps: int):
    """64,000 images, so a pass has 1,000 steps; a step takes 2 s, an epoch 600 s; two epochs for a pass."""
    found = starter.lengths(room, 64_000, 600.0, 2.0)
    assert (found["fraction"], found["epochs"], found["steps"]) == (fraction, epochs, steps)
    assert found["passes"] == steps * 64 / (fraction * 64_000)


def test_fewer_images_than_a_batch_are_a_pass_each_step():
    assert starter.lengths(1e6, 40, 1.0, 1.0)["passes"] == 1200


@pytest.mark.parametrize(
    ("size", "asked", "found"),
    [((20, 28), None, 16), ((300, 200), None, 64), ((50, 40), None, 32), ((9, 9), None, 16), ((9, 9), 24, 24)],
)
def test_images_are_not_blown_up(clock, tmp_path: Path, size: tuple[int, int], asked: int | None, found: int):
    """The largest usual size that the median image has; 64 pixels at most where there is no GPU."""
    images(tmp_path / "s", 2, 4, 1, size)
    images(tmp_path / "t", 2, 6, 1, (8, 8))
    assert written(tmp_path, None, None, None, asked).model.image_size == found


def test_the_larger_images_of_both_datasets_decide(clock, tmp_path: Path):
    images(tmp_path / "s", 2, 4, 1, (20, 28))
    images(tmp_path / "t", 2, 6, 1, (70, 33))
    assert written(tmp_path).model.image_size == 32
    assert "the larger of source and target have 33, by the median" in (tmp_path / "recipe.toml").read_text()


def test_a_gpu_gets_a_larger_network_and_the_stem_for_its_images():
    def found(side: int, *, gpu: bool, arch: str | None = None, size: int | None = None):
        one = starter._networks(starter._side(side, size, gpu), arch, gpu, size is not None)
        return [(keys["arch"], keys["stem"], keys["image_size"]) for keys in one]

    assert found(500, gpu=True) == [("resnet18", "imagenet", 224)]
    assert found(40, gpu=True) == [("resnet18", "small", 32)]
    slower = [("resnet20", "small", 64), ("resnet8", "small", 64), ("resnet8", "small", 32)]
    assert found(500, gpu=False) == slower
    assert found(500, gpu=False, size=48) == [("resnet20", "small", 48), ("resnet8", "small", 48)]
    assert found(500, gpu=False, arch="mobilenet_v2") == [("mobilenet_v2", "imagenet", 64)]
    assert found(40, gpu=True, arch="resnet32") == [("resnet32", "small", 32)]


@pytest.mark.parametrize(
    ("name", "config", "asked", "side", "said"),
    [
        ("mobilenetv3_small_050", {"mean": [0.5] * 3, "std": [0.25] * 3}, None, 16, "a guess"),
        ("mobilenetv3_small_050", {"input_size": [3, 96, 96]}, None, 16, "the weights were trained at 96"),
        ("mobilenetv3_small_050", None, "timm:mobilenetv3_small_050", 16, "a guess"),
        ("vit_tiny_patch16_224", {"input_size": [3, 64, 64]}, None, 64, "that of the weights"),
    ],
)
def test_a_network_of_timm_is_told_by_its_folder_or_by_name(
    clock, tmp_path: Path, capsys, name: str, config: dict[str, Any] | None, asked: str | None, side: int, said: str
):
    """With the normalisation that it was trained with; a transformer takes images of the size that it was built for.

    Any other takes the images as they are, and it is said where its config.json tells of another size.
    """
    timm = pytest.importorskip("timm", reason="the extra timm is not installed")
    images(tmp_path / "s", 3, 4, 1)
    images(tmp_path / "t", 2, 6, 1)
    options = {"img_size": 64} if name.startswith("vit") else {}
    (tmp_path / "net").mkdir()
    save_file(timm.create_model(name, num_classes=3, **options).state_dict(), tmp_path / "net/model.safetensors")
    if config is None:
        with pytest.raises(CheckpointError, match="--arch"):
            written(tmp_path, None, str(tmp_path / "net"))
    else:
        told = {"architecture": name, "pretrained_cfg": config}
        (tmp_path / "net/config.json").write_text(json.dumps(told))
    recipe = written(tmp_path, None, str(tmp_path / "net"), asked, None, None, 30, False)
    text, err = (tmp_path / "recipe.toml").read_text(), capsys.readouterr().err
    assert said in next(line for line in text.splitlines() if line.startswith("image_size"))
    assert ("the weights were trained at 96 pixels; image_size is 16 (--size 96)" in err) == ("at 96" in said)
    assert ("mean and std are ImageNet's, a guess" in text) == ("mean" not in (config or {}))
    usual = {"mean": [*networks.MEAN], "std": [*networks.STD]}
    assert recipe.pretrain is not None and recipe.pretrain.weights == str(tmp_path / "net")
    assert (recipe.model.arch, recipe.model.image_size) == (f"timm:{name}", side)
    assert {"mean": recipe.model.mean, "std": recipe.model.std} == usual | {
        key: numbers for key, numbers in (config or {}).items() if key in usual
    }


@pytest.mark.parametrize(
    ("arch", "variants", "kinds"),
    [
        ("mobilenet_v3_small", ["rand"], ["full", "norms", "renorm-probe", "probe"]),  # hard sigmoids
        ("convnext_tiny", ["gc", "rand"], ["full", "probe"]),  # no batch norm
        ("resnet32", ["gc", "rand"], ["full", "norms", "renorm-probe", "probe"]),
        ("resnet18", ["gc", "rand"], ["full", "norms", "renorm-probe", "probe"]),
    ],
)
def test_disposal_and_attackers_are_those_that_the_network_can(
    clock, tmp_path: Path, arch: str, variants: list[str], kinds: list[str]
):
    images(tmp_path / "s", 2, 4, 1, (32, 32))
    images(tmp_path / "t", 2, 6, 1, (32, 32))
    recipe = written(tmp_path, None, None, arch)
    assert [*recipe.dispose] == variants
    text = (tmp_path / "recipe.toml").read_text()
    assert ("cannot differentiate hardsigmoid twice" in text) == (variants == ["rand"])
    assert "does not fit into" not in text
    assert (recipe.piggyback.models, recipe.audit.models) == (["scratch", "TL", *variants], [])
    assert [one.kind for one in recipe.piggyback.attackers] == kinds
    network_demands.check(recipe, "mine.toml")


@pytest.mark.parametrize("weights", [None, "net.safetensors"])
@pytest.mark.parametrize(
    ("arch", "size", "said"), [("resnet81", None, "did you mean 'resnet8'"), ("vit_b_16", 40, "not a multiple")]
)
def test_a_network_that_cannot_be_is_refused_before_data_are_read(
    weights: str | None, arch: str, size: int | None, said: str, tmp_path: Path
):
    """There are none here."""
    with pytest.raises(RecipeError, match=f"init: .*{said}"):
        written(tmp_path, None, weights, arch, size)
    with pytest.raises(DataError, match="does not exist"):
        written(tmp_path, None, weights, "vit_b_16", None)


def test_an_export_says_its_own_width_and_size(clock, tmp_path: Path):
    """The images have 20 pixels, and 64; the network was trained on 24, which is what it gets unless asked."""
    images(tmp_path / "s", 3, 4, 1)
    images(tmp_path / "t", 2, 6, 1, (64, 64))
    spec: dict[str, Any] = {"arch": "resnet8", "stem": "small", "width": 24, "image_size": 24, "mean": [0.4, 0.5, 0.6]}
    model = networks.build(heads={"target": 2}, **spec)
    header = {"dtlctl": json.dumps({**spec, "std": [1.0, 1.0, 1.0], "classes": ["class0", "class1"]})}
    save_file(model.plain_state("target"), tmp_path / "net.safetensors", header)
    recipe = written(tmp_path, None, str(tmp_path / "net.safetensors"))
    assert {**recipe.model.model_dump(), **spec} == recipe.model.model_dump()
    assert recipe.finetune.weights
    assert written(tmp_path, None, str(tmp_path / "net.safetensors"), None, 32).model.image_size == 32


def test_a_size_that_is_asked_for_is_never_another(clock, tmp_path: Path):
    """A transformer of 64 pixels has weights for each of its patches: they fit no other size."""
    timm = pytest.importorskip("timm", reason="the extra timm is not installed")
    images(tmp_path / "s", 3, 4, 1)
    images(tmp_path / "t", 2, 6, 1)
    (net := tmp_path / "net").mkdir()
    network = timm.create_model(name := "vit_tiny_patch16_224", num_classes=3, img_size=64)
    save_file(network.state_dict(), net / "model.safetensors")
    config = {"architecture": name, "pretrained_cfg": {"input_size": [3, 64, 64]}}
    (net / "config.json").write_text(json.dumps(config))
    assert written(tmp_path, None, str(net), None, 64).model.image_size == 64
    with pytest.raises(CheckpointError, match="do not fit"):
        written(tmp_path, None, str(net), None, 32)


def test_a_network_that_is_narrow_is_taken_as_it_is(clock, tmp_path: Path):
    """Of 8 channels, for which no recipe may ask for `channels_last`."""
    images(tmp_path / "s", 3, 4, 1)
    images(tmp_path / "t", 2, 6, 1)
    spec: dict[str, Any] = {"arch": "resnet8", "stem": "small", "width": 8, "image_size": 16}
    header = {"dtlctl": json.dumps({**spec, "classes": ["class0", "class1"]})}
    state = networks.build(heads={"target": 2}, **spec).plain_state("target")
    save_file(state, tmp_path / "net.safetensors", header)
    model = written(tmp_path, None, str(tmp_path / "net.safetensors")).model
    assert (model.width, model.channels_last) == (8, False)


def test_an_attackers_images_are_a_dataset_of_their_own(clock, tmp_path: Path):
    images(tmp_path / "s", 2, 4, 1)
    images(tmp_path / "t", 2, 6, 1)
    recipe = written(tmp_path, str(images(tmp_path / "his", 2, 4, 1)), None, None, None, "other")
    assert recipe.name == "other"
    assert recipe.data.piggyback["attacker"].path == str(tmp_path / "his")
    assert set(recipe.data.piggyback) == {"source", "attacker"}
    with pytest.raises(RecipeError, match="name: a name is 1 to 64"):
        written(tmp_path, None, None, None, None, "a/b")


def test_digits_are_not_mirrored(clock, tmp_path: Path):
    """Of somebody's folder it is not known whether its images may be: that is left to him, in a comment."""
    text = starter.write("builtin:digits", str(images(tmp_path / "t", 2, 6, 1)), "builtin:digits", *[None] * 4)
    data = tomllib.loads(text)["data"]
    tables = data["source"], data["target"], data["piggyback"]["attacker"]
    assert [table["augment"] for table in tables] == ["crop", "crop-flip", "crop"]
    assert text.count("where a mirrored image is something else") == 1


def test_a_file_name_cannot_write_into_the_recipe(clock, tmp_path: Path):
    """What the data room says quotes file names, and it stands in comments."""
    images(tmp_path / "s", 2, 4, 1)
    (tmp_path / "s/train/class0/x\nseed = 7\n#.txt").write_text("x")
    images(tmp_path / "t", 2, 6, 1)
    assert written(tmp_path).seed == 0
    assert "seed = 7" in (tmp_path / "recipe.toml").read_text()
    for name in ('a "b" # c', "\N{GRINNING FACE} 'q'  # x"):
        images(tmp_path / name, 2, 4, 1)
        assert written(tmp_path, str(tmp_path / name)).data.piggyback["attacker"].path == str(tmp_path / name)
    for name in ("a\x7fb", "a\udce9b"):  # a control character, a byte that is no UTF-8
        images(tmp_path / name, 2, 4, 1)
        with pytest.raises(RecipeError, match="cannot be written as TOML"):
            written(tmp_path, str(tmp_path / name))


def test_what_is_no_dataset_is_told_as_a_run_would(clock, tmp_path: Path):
    images(tmp_path / "s", 2, 4, 1)
    with pytest.raises(DataError, match=r"data\.target\.path: .* does not exist"):
        written(tmp_path)
    (tmp_path / "t").mkdir()
    with pytest.raises(DataError, match=r"data\.target\.path: .* holds no image and no table"):
        written(tmp_path)
    images(tmp_path / "t", 2, 6, 1)
    (tmp_path / "t/train/class1/0.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"data\.target\.path: .*class1/0\.png: it is no image"):
        written(tmp_path)
    with pytest.raises(DataError, match=r"data\.source\.path: typo is no folder"):
        starter.write("typo", str(tmp_path / "t"), None, None, None, None, None)
    images(tmp_path / "one", 1, 4, 1)
    with pytest.raises(DataError, match=r"data\.source\.path: .*: only one class, 'class0'"):
        starter.write(str(tmp_path / "one"), str(tmp_path / "t"), None, None, None, None, None)


def test_a_target_that_is_the_source_is_told(clock, tmp_path: Path, capsys):
    images(tmp_path / "s", 2, 6, 1)
    (tmp_path / "t").symlink_to(tmp_path / "s")
    written(tmp_path, None, None, None, None, None, 30, False)
    assert "init: data.target: its training images are those of data.source" in capsys.readouterr().err


def test_folders_without_a_test_split_have_a_part_held_out(clock, tmp_path: Path):
    """Class folders alone, and a train split alone. Of 10 images of each class 2 are held out."""
    images(tmp_path / "pool", 2, 10, 1)
    (tmp_path / "pool/train").rename(tmp_path / "s")
    images(tmp_path / "t", 3, 10, 1, split="other")
    shutil.rmtree(tmp_path / "t/other")
    recipe = written(tmp_path)
    assert recipe.data.source.test == recipe.data.target.test == 0.2
    assert "16 training images of 2 classes, 8 of each; 4 test images" in (tmp_path / "recipe.toml").read_text()


def test_what_is_held_out_is_what_a_run_holds_out(clock, tmp_path: Path):
    """Copies of an image go to one side, so that the seed decides how many images are held out."""
    random, pixels = np.random.default_rng(0), np.empty(0)
    for role, name in [("s", "a"), ("s", "b"), ("t", "a"), ("t", "b")]:
        (tmp_path / role / name).mkdir(parents=True)
        for number in range(40):  # in each class of the source, one image in four is twice there
            if role == "t" or number % 4 < 3:
                pixels = random.integers(0, 256, (20, 20), np.uint8)
            Image.fromarray(pixels).save(tmp_path / role / name / f"{number}.png")
    recipe = written(tmp_path)
    source = Source(recipe.data.source, "source", recipe.stream("subset/source"))
    train, test = (len(source.rows(split, 16, tmp_path / "scratch").labels) for split in ("train", "test"))
    said = (tmp_path / "recipe.toml").read_text().partition("[data.target]")[0]
    assert f"# {train} training images of 2 classes" in said and f"; {test} test images" in said


@pytest.mark.parametrize(("arch", "places", "told"), [
    ("resnet18", "1", "fc.1: if only dropout"), ("resnet34", "1", "its head is fc.1"),
    ("resnet18", "03", "has several layers"),
])  # fmt: skip
def test_a_head_of_several_modules_is_told_of_the_network_that_it_is_of(clock, tmp_path: Path, arch, places, told):
    """And not that the network may be another one."""
    images(tmp_path / "s", 2, 4, 1)
    images(tmp_path / "t", 2, 6, 1)
    state = networks.build(arch, {}, stem="imagenet").backbone.state_dict()
    state |= {f"fc.{place}.bias": torch.zeros(2) for place in places}
    save_file(state, tmp_path / "pre.safetensors")
    with pytest.raises(CheckpointError, match=f"do not fit {arch}: .*{told}") as error:
        written(tmp_path, None, str(tmp_path / "pre.safetensors"))
    assert "--arch" not in str(error.value)


@pytest.mark.parametrize(("classes", "table"), [(3, "finetune"), (2, "pretrain"), (5, "pretrain")])
def test_weights_are_adopted_where_their_head_fits(clock, tmp_path: Path, classes: int, table: str):
    """2 classes of the source, 3 of the target: a head of 3 is a transfer-learned model's."""
    images(tmp_path / "s", 2, 4, 1)
    images(tmp_path / "t", 3, 4, 1)
    network = torchvision.models.resnet18(num_classes=classes)
    save_file(network.state_dict(), tmp_path / "net.safetensors")
    if classes == 5:  # of neither, and nothing names them
        with pytest.raises(CheckpointError, match="its head has 5 outputs without names; the source has 2 classes"):
            written(tmp_path, None, str(tmp_path / "net.safetensors"))
        return
    recipe = written(tmp_path, None, str(tmp_path / "net.safetensors"))
    given = {"pretrain": recipe.pretrain and recipe.pretrain.weights, "finetune": recipe.finetune.weights}
    assert {name for name, weights in given.items() if weights} == {table}
    assert recipe.model.arch == "resnet18"
    # With ImageNet's stem and images so small its maps end small.
    assert [*recipe.dispose] == ["null", "gc"] and recipe.dispose["null"].unlearn.kind == "null-space"


@pytest.mark.parametrize(("names", "table"), [(("a", "b"), "pretrain"), (("b", "c"), "finetune"), ((), "pretrain")])
def test_where_both_heads_would_have_the_size_the_names_decide(clock, tmp_path: Path, names, table: str):
    for folder, classes in (("s", "ab"), ("t", "bc")):
        images(tmp_path / folder, 2, 6, 1)
        for split in ("train", "test"):
            for number, name in enumerate(classes):
                (tmp_path / folder / split / f"class{number}").rename(tmp_path / folder / split / name)
    spec: dict[str, Any] = {"arch": "resnet8", "stem": "small", "width": 8, "image_size": 16}
    header = {"dtlctl": json.dumps({**spec, "classes": names})}
    state = networks.build(heads={"target": 2}, **spec).plain_state("target")
    save_file(state, tmp_path / "net.safetensors", header)
    recipe = written(tmp_path, None, str(tmp_path / "net.safetensors"))
    assert (recipe.finetune.weights or "", recipe.pretrain.weights or "")[table == "pretrain"].endswith(
        "net.safetensors"
    )


def test_only_images_that_the_weights_may_have_learned_are_told_of(clock, tmp_path: Path):
    """All three datasets have a test split held out; weights of the source have seen no image of the others."""
    for name, classes in (("s", 2), ("t", 3), ("a", 2)):
        images(tmp_path / "pool", classes, 10, 1)
        (tmp_path / "pool/train").rename(tmp_path / name)
        shutil.rmtree(tmp_path / "pool")
    for classes, told in ((2, {"source"}), (3, {"source", "target"})):
        save_file(torchvision.models.resnet18(num_classes=classes).state_dict(), tmp_path / "net.safetensors")
        written(tmp_path, str(tmp_path / "a"), str(tmp_path / "net.safetensors"))
        tables = (tmp_path / "recipe.toml").read_text().split("\n[data.")[1:]
        assert {one.partition("]")[0] for one in tables if "the weights have not seen" in one} == told


@pytest.mark.parametrize(("classes", "each", "told"), [(2, 5, "2 classes"), (9, 2, "9 classes"), (9, 3, "")])
def test_a_target_that_no_disposal_could_use_is_refused(clock, tmp_path: Path, classes: int, each: int, told: str):
    """0.8 of 2 classes of 4 are 6 images, and a step has 8 or more; of 2 of a class both; of 9 classes of 3 are 18."""
    images(tmp_path / "s", 2, 6, 1)
    images(tmp_path / "t", classes, each - (classes == 2), 1)
    if not told:
        assert written(tmp_path).data.target.fraction == 0.8
        return
    with pytest.raises(DataError, match=f"training images of {told} are too few: a step .* takes 8 or more"):
        written(tmp_path)


def test_the_limit_of_a_price_is_one_that_the_test_images_can_tell(clock, tmp_path: Path):
    """6 test images tell a price to ± 196 sqrt(0.2 / 6) = 35.8 points: 1 point is shown to be below 37, not below 2."""
    images(tmp_path / "s", 2, 4, 1)
    images(tmp_path / "t", 3, 4, 2)
    assert written(tmp_path).publish.price == 37
