"""`dtlctl bench`, as the command line sees it."""

import json
from typing import Annotated, Literal

import typer

from dtlctl.cli.commands import Json, Quiet
from dtlctl.errors import RecipeError


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
