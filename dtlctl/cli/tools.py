"""Commands that need no recipe: init, schema and bench."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from dtlctl.cli.commands import Json, Quiet
from dtlctl.console.progress import say
from dtlctl.errors import RecipeError, suggest


def shipped() -> dict[str, str]:
    """The recipes that come with the package, by name. They lie beside it until it is built, and then in it."""
    package = Path(__file__).parents[1]
    folder = package if (package / "recipes").is_dir() else package.parent
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("recipes/*.toml"))}


def init(
    which: Annotated[str | None, typer.Argument(
        metavar="NAME", help="A shipped recipe, to print.", autocompletion=lambda: [*shipped()])] = None,
    listed: Annotated[bool, typer.Option("--list", help="List the shipped recipes.")] = False,
    source: Annotated[str | None, typer.Option(metavar="PATH", help="Private data, as `path` in a recipe.")] = None,
    target: Annotated[str | None, typer.Option(metavar="PATH", help="Data of the task that you publish.")] = None,
    attacker: Annotated[str | None, typer.Option(metavar="PATH", help="Data that an attacker may have.")] = None,
    weights: Annotated[str | None, typer.Option(
        metavar="FILE", help="A network trained on the source already, or on the target after it.")] = None,
    arch: Annotated[str | None, typer.Option(
        metavar="NAME", help="The network: resnet18, timm:NAME, ...; default: what fits here.")] = None,
    size: Annotated[int | None, typer.Option(min=8, max=1024, help="Pixels; default: by the images.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the run; default: by the folders.")] = None,
    minutes: Annotated[int, typer.Option(min=5, help="What the run may take here, about: more trains longer.")] = 30,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Print a recipe to begin with: one for your data and this machine, or one that comes with dtlctl."""
    if (source is None) != (target is None):
        raise RecipeError("init: --source and --target go together")
    if [listed, which is not None, source is not None].count(True) != 1:
        raise RecipeError("init: give --source PATH --target PATH, or NAME of a shipped recipe, or --list")
    if source is None and (attacker or weights or arch or size or name):
        raise RecipeError("init: --attacker, --weights, --arch, --size and --name go with --source and --target")
    if source is not None and target is not None:
        say("init: looking at the data, and measuring some steps of training", quiet)
        from dtlctl.stages import starter

        print(starter.write(source, target, attacker, weights, arch, size, name, minutes, quiet), end="")
        return
    known = shipped()
    if which is None:
        print("\n".join(f"{title:<18}{text.partition(chr(10))[0].lstrip('# ')}" for title, text in known.items()))
    elif which in known:
        print(f"#:schema ./dtlctl.schema.json\n{known[which]}", end="")  # Taplo's and Tombi's word for it
    else:
        raise RecipeError(f"init: no shipped recipe {which!r}{suggest(which, known)}")


def schema() -> None:
    """Print the JSON schema of a recipe, for an editor that completes and explains keys."""
    from dtlctl.recipe.schema import json_schema

    print(json.dumps(json_schema(), indent=1, ensure_ascii=False))


def bench(
    arch: Annotated[str, typer.Option(help="A torchvision classifier, resnet10, or a CIFAR ResNet.")] = "resnet18",
    stem: Annotated[Literal["imagenet", "small"], typer.Option(help="As in a recipe.")] = "imagenet",
    image_size: Annotated[int, typer.Option(min=8, max=1024, help="Pixels.")] = 32,
    batch_size: Annotated[int, typer.Option(min=4, help="Images of a step.")] = 128,
    chunks: Annotated[str | None, typer.Option(help="Numbers of chunks, with commas; default: 2,4,8,16,32.")] = None,
    ways: Annotated[str | None, typer.Option(help="Ways to measure beside ce, with commas; default: all.")] = None,
    precision: Annotated[Literal["float32", "tf32", "bfloat16"], typer.Option(help="Of the forward pass.")] = "float32",
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Keep a pixel's channels together.")] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Measurements of each; the median is shown.")] = 5,
    train: Annotated[bool, typer.Option(
        "--train", help="Measure training on images instead, beside a plain script.")] = False,
    data: Annotated[str | None, typer.Option(
        metavar="PATH", help="Images to train on, as in a recipe; default: builtin:letters.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps of a turn; default: 20.")] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Measure what a step of gradient collision costs here, in every way, beside a step of cross-entropy.

    With --train: how many images a second training takes, on ready tensors, as pretrain does it, and by a plain script.
    """
    of_collisions = {"--chunks": chunks, "--ways": ways}
    for option, value in (of_collisions if train else {"--data": data, "--steps": steps}).items():
        if value:
            other = "the benchmark of collisions; leave it or --train out" if train else "training; add --train"
            raise RecipeError(f"bench: {option} is for {other}")
    from dtlctl.bench import collision, meter, training

    setup = meter.Setup(arch, stem, image_size, batch_size, precision, channels_last, repeats, quiet)
    if train:
        document, text = training.run(setup, data or "builtin:letters", steps or 20), training.text
    else:
        document, text = collision.run(setup, chunks or "2,4,8,16,32", ways), collision.text
    print(json.dumps(document, indent=1) if as_json else text(document))
