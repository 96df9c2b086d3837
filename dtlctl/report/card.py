"""A model's folder for others: weights, `config.json`, and a Hugging Face model card with the evidence."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dtlctl.errors import CheckpointError, RecipeError, suggest
from dtlctl.model.networks import DEPTHS, TIMM, precision, timm_options
from dtlctl.recipe.settings import Publish
from dtlctl.report import audit, tables, templates, verdict
from dtlctl.report.results import recipe_of, results_of
from dtlctl.report.summary import summarise
from dtlctl.run import export
from dtlctl.run.experiment import Experiment
from dtlctl.storage import checkpoint

WEIGHTS, CONFIG, CARD, ONNX = "model.safetensors", "config.json", "README.md", "model.onnx"
SAID = {WEIGHTS: "weights_sha256", CONFIG: "config_sha256", ONNX: "onnx_sha256"}
PREPROCESSING = {
    "orientation": "EXIF applied", "transparency": "over white", "mode": "RGB", "crop": "centre square",
    "interpolation": "bicubic (Pillow)", "range": [0, 1],
}  # fmt: skip
"""As `data/pixels.py` makes pixels of a picture."""
ROUNDED = 0.001
"""The share of test images that another processor may decide otherwise, by rounding; of few images it is one."""


def evidence(experiment: Experiment) -> dict[str, Any]:
    """What the run's report says, under the limits of this call. RecipeError where the run is of another recipe."""
    made, asked = ({**one.resolved(), "publish": None} for one in (recipe_of(experiment.folder), experiment.recipe))
    if made != asked:
        other = ", ".join(name for name in asked if made.get(name) != asked[name])
        remedy = f"repeat the --set of the run, or run: {experiment.command('run')}"
        raise RecipeError(f"{experiment.folder}: made from other settings of {other}; {remedy}")
    document = summarise([experiment.folder])
    return document | {"verdict": asdict(verdict.verdict(document, experiment.recipe.publish))}


def known(experiment: Experiment, model: str | None, document: dict[str, Any] | None = None) -> str:
    """The model that is meant: without a name the one that the verdict recommends.

    Raises RecipeError for any other, and CheckpointError for one that is not up to date.
    """
    names = [job.model for job in experiment.jobs if job.stage in ("finetune", "dispose")]
    model = model or (document["verdict"]["recommended"] if document else None)
    if model is None:
        why = f"{document['verdict']['sentences'][0]} For one all the same, " if document else "a file has no verdict: "
        raise RecipeError(f"export: {why}say which model, as --model NAME (one of {', '.join(names)})")
    if model not in names:
        valid = suggest(model, names)
        raise RecipeError(f"--model {model}: {experiment.source} has no such model with a target head{valid}")
    experiment.results.require(model)
    return model


def folder(experiment: Experiment, model: str, document: dict[str, Any], onnx: bool = False) -> dict[str, bytes]:
    """The files of an exported folder by name. document: what `evidence` returns. Raises as `export`'s functions."""
    weights, described = export.packed(experiment, model)
    files = {WEIGHTS: weights, **({ONNX: export.onnx(experiment, model)} if onnx else {})}
    picture = {name: described.pop(name) for name in ("mean", "std")}
    config = {
        "format": 1,
        "made_by": "dtlctl",
        **described,
        "preprocessing": {**PREPROCESSING, "size": described["image_size"], **picture},
        **{SAID[name]: _hash(blob) for name, blob in files.items()},
    }
    files[CONFIG] = checkpoint.dump(config).encode()
    hashes = {"weights": _hash(weights), "config": _hash(files[CONFIG])}
    return {**files, CARD: _card(experiment, model, document, config, hashes).encode()}


def verify(path: Path, experiment: Experiment | None = None) -> dict[str, Any]:
    """What was compared: hashes and, with a recipe's experiment, acc_t measured here and that of the card.

    Raises CheckpointError where one is another.
    """
    from huggingface_hub import ModelCard

    try:
        card: Any = ModelCard((path / CARD).read_text(encoding="utf-8")).data
        said, measured = card.to_dict()["dtlctl"], float(card.eval_results[0].metric_value)
        config = json.loads((path / CONFIG).read_bytes())
        told = [(CARD, WEIGHTS, said["weights"]), (CARD, CONFIG, said["config"])]
        told += [(CONFIG, WEIGHTS, config[SAID[WEIGHTS]])]
        if (path / ONNX).exists() or SAID[ONNX] in config:
            told += [(CONFIG, ONNX, config.get(SAID[ONNX], "no such file"))]
        hashes = {name: _hash((path / name).read_bytes()) for _, name, _ in told}
    except Exception as error:  # a stranger's YAML and JSON may end in any
        raise CheckpointError(f"{path}: not a folder that dtlctl exported ({' '.join(str(error).split())})") from None
    for place, name, expected in told:
        if (found := hashes[name]) != expected:
            raise CheckpointError(f"{path / name}: not the file of this card\nSHA-256 {found}; {place}: {expected}")
    compared: dict[str, Any] = {SAID[name]: digest for name, digest in hashes.items()}
    if experiment is None:
        return compared
    model = export.load(path)
    if list(experiment.data.classes("target")) != config["classes"]:
        raise CheckpointError(f"{path / CONFIG}: its classes are not those of data.target in {experiment.source}")
    model.precision = experiment.recipe.precision
    with precision(model.precision):
        placed = model.to(experiment.engine.device)
        acc_t = experiment.trainer.measured(placed, {"acc_t": ("target", "target")})["acc_t"]
    images = len(experiment.data.images("target", "test").labels)
    if not abs(acc_t - measured) / 100 * images <= max(1, ROUNDED * images) + 0.5:  # nor where the card says .nan
        raise CheckpointError(f"{path / CARD}: Acc_t is {acc_t:.9g} on this recipe's test split, not {measured:.9g}")
    return {**compared, "acc_t": acc_t, "acc_t_card": measured}


def _card(experiment: Experiment, model: str, document: Any, config: dict[str, Any], hashes: dict[str, str]) -> str:
    """The model card as Markdown, its metadata before it."""
    from huggingface_hub import EvalResult, ModelCardData

    recipe, evidence = experiment.recipe, document["evidence"]
    own = evidence[model]
    task: Any = {"task_type": "image-classification", "metric_type": "accuracy"}
    results = [EvalResult(dataset_name="target", dataset_type="target", metric_name="Acc_t, %",
                          metric_value=own["acc_t"], **task)]  # fmt: skip
    for name, attack in own["attacks"].items():
        results.append(EvalResult(dataset_name=name, dataset_type="piggyback", metric_value=attack["accuracy"]["value"],
                                  metric_name=f"Acc_pl, %, of an attacker ({attack['attacker']})", **task))  # fmt: skip
    data = ModelCardData(
        model_name=f"{recipe.name}-{model}",
        library_name="timm" if config["arch"].startswith(TIMM) else "torchvision",
        pipeline_tag="image-classification",
        tags=["disposable-transfer-learning"],
        eval_results=results,
        dtlctl=hashes,
    )
    return templates.render(
        "card.md.j2",
        card_data=data.to_yaml(),
        title=data.model_name,
        model=model,
        config=config,
        sentences=[*_sentences(document, model, recipe.publish or Publish()), *_moved(experiment)],
        table=tables.render([_table(evidence, model)]).strip(),
        audited=audit.conclusion([one for one in audit.read([experiment.folder]) if one.model == model]),
        attackers=templates.said("who", document["recipe"]["piggyback"]) if own["attacks"] else "",
        code=_code(config),
        lineage=_lineage(experiment, model, hashes),
        never=[other for other in ("TL", "TGT", "scratch") if not evidence.get(other, {}).get("attacks")],
    )


def _sentences(document: dict[str, Any], model: str, limits: Publish) -> list[str]:
    """The verdict, with what the limits say of the model in this folder, whichever is recommended."""
    chosen, sentences = document["verdict"]["recommended"], document["verdict"]["sentences"]
    if model == chosen:
        return sentences
    own = [f"[publish] {text}" for _, text in verdict.held(document["evidence"], model, limits)]
    first = f"This is {model}, which is not what the verdict recommends."
    return [first, *own, *(text for text in sentences if not text.startswith("[publish]"))]


def _moved(experiment: Experiment) -> list[str]:
    """A sentence where the limits are not those that the run was made with: they may have been set to fit."""
    before, now = ((one.publish or Publish()).model_dump() for one in (recipe_of(experiment.folder), experiment.recipe))
    changed = [f"{name} from {before[name]} to {now[name]}" for name in now if before[name] != now[name]]
    return [f"Limits of [publish] changed after the evidence was there: {', '.join(changed)}."] if changed else []


def _table(evidence: dict[str, Any], model: str) -> tables.Table:
    """This model first, then what stands beside it: no other that could be published in its place, but TGT and TL."""
    names = list(dict.fromkeys(name for one in evidence.values() for name in one["attacks"]))
    beside = [one for one, own in evidence.items() if one in ("TGT", "TL") or (one != "pre" and "acc_t" not in own)]
    rows = []
    for one in dict.fromkeys([model, *beside]):
        own = evidence[one]
        figures = [own.get("accuracy"), *(own["attacks"].get(name, {}).get("accuracy") for name in names)]
        rows.append([one, *(templates.span(figure, ".1f") if figure else "–" for figure in figures)])
    return tables.Table("", ["Model", "Acc_t", *names], rows)


def _code(config: dict[str, Any]) -> str:
    """How plain torchvision or timm loads it; what torchvision has no name for is built of its blocks."""
    arch, classes = config["arch"], len(config["classes"])
    options = timm_options(arch, config["image_size"]) if arch.startswith(TIMM) else {}
    return templates.render("load.py.j2", **{**config, "classes": classes}, options=options, depth=DEPTHS.get(arch))


def _lineage(experiment: Experiment, model: str, hashes: dict[str, str]) -> dict[str, str]:
    """Hashes by what they are of; no name or place of any data."""
    results = results_of(experiment.folder, experiment.recipe)
    sidecars = {result.job.model: result.sidecar for result in results if result.job.makes_model}
    own, recipe = sidecars[model], (experiment.folder / "recipe.json").read_bytes()
    found = {f"SHA-256 of {name}": digest for name, digest in zip((WEIGHTS, CONFIG), hashes.values(), strict=True)}
    found |= {"SHA-256 of the recipe, every setting": _hash(recipe), "key of the result": own["key"]}
    found |= {f"SHA-256 of the weights of {parent}": digest for parent, digest in own["parent"].items()}
    maker: str | None = model
    while maker:  # it, what it was made from, and so on: TGT has nothing from TL
        if adopted := sidecars[maker].get("weights"):
            found[f"weights from outside that {maker} is"] = adopted.get("sha256") or adopted["torchvision"]
        maker = next(iter(sidecars[maker]["parent"]), None)
    for role, one in own["data"].items():
        found |= {f"images of the {role}, {split}": one[split] for split in ("train", "test")}
    return found


def _hash(blob: bytes) -> str:
    return hashlib.sha256(blob).hexdigest()
