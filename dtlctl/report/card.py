"""A model's folder for others: weights, `config.json`, and a Hugging Face model card with the evidence."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import jinja2

from dtlctl.errors import CheckpointError, RecipeError, suggest
from dtlctl.model.networks import TIMM, precision, timm_options
from dtlctl.report import files as pages
from dtlctl.report.intervals import accuracy
from dtlctl.report.results import recipe_of, results_of
from dtlctl.report.summary import summarise
from dtlctl.report.tables import Table, render
from dtlctl.run import export
from dtlctl.run.experiment import Experiment
from dtlctl.storage import checkpoint

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
PREPROCESSING = {
    "orientation": "EXIF applied", "transparency": "over white", "mode": "RGB", "crop": "centre square",
    "interpolation": "bicubic (Pillow)", "range": [0, 1],
}  # fmt: skip
"""As `data/pixels.py` makes pixels of a picture."""
PICTURE = """import json, numpy as np, torch
from PIL import Image, ImageOps
config = json.load(open("config.json"))["preprocessing"]
picture = ImageOps.exif_transpose(Image.open("photo.png")).convert("RGB")
picture = ImageOps.fit(picture, (config["size"], config["size"]), Image.Resampling.BICUBIC)
x = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255
x = (x - torch.tensor(config["mean"]).view(3, 1, 1)) / torch.tensor(config["std"]).view(3, 1, 1)
print(json.load(open("config.json"))["classes"][model(x).argmax()])"""
LOADING = (
    "from safetensors.torch import load_file", f'model.load_state_dict(load_file("{WEIGHTS}"))', "model.eval()"
)  # fmt: skip
UNMEASURED = (
    "Attackers with other data, more of it, or other methods than those above.",
    "Anything but accuracy on the target's test split: calibration, robustness, fairness.",
    "Images from elsewhere than the target's data.",
)


def evidence(experiment: Experiment) -> dict[str, Any]:
    """What the run's report says. Raises RecipeError where the run was made from another recipe."""
    if recipe_of(experiment.folder).resolved() != experiment.recipe.resolved():
        raise RecipeError(f"{experiment.folder}: made from other settings; run: {experiment.command('run')}")
    return summarise([experiment.folder])


def known(experiment: Experiment, model: str | None, document: dict[str, Any] | None = None) -> str:
    """The model that is meant: without a name the one that the verdict recommends. Raises RecipeError for any other."""
    names = [job.model for job in experiment.jobs if job.stage in ("finetune", "dispose")]
    model = model or (document["verdict"]["recommended"] if document else None)
    if model is None:
        why = f": {document['verdict']['sentences'][0]}" if document else " of a file"
        raise RecipeError(f"export: say which model, as --model NAME (one of {', '.join(names)}){why}")
    if model not in names:
        raise RecipeError(f"--model {model}: {experiment.source} has no such model with a target head"
                          f"{suggest(model, names)}")  # fmt: skip
    return model


def folder(experiment: Experiment, model: str, document: dict[str, Any]) -> dict[str, bytes]:
    """The files of an exported folder by name. document: `summary.summarise` of the run. Raises as `export.packed`."""
    weights, described = export.packed(experiment, model)
    picture = {name: described[name] for name in ("mean", "std")}
    config = {
        "format": 1,
        "made_by": "dtlctl",
        **{name: value for name, value in described.items() if name not in picture},
        "preprocessing": {**PREPROCESSING, "size": described["image_size"], **picture},
        "weights_sha256": _hash(weights),
    }
    blob = checkpoint.dump(config).encode()
    card = _card(experiment, model, document, described, {"weights": _hash(weights), "config": _hash(blob)})
    return {WEIGHTS: weights, CONFIG: blob, CARD: card.encode()}


def verify(path: Path, experiment: Experiment | None = None) -> dict[str, Any]:
    """What was compared: {"weights_sha256", "config_sha256"} and, with a recipe's experiment, {"acc_t"}.

    Raises CheckpointError where a file is not what the card says, and for what is no exported folder.
    """
    from huggingface_hub import ModelCard

    try:
        blobs = {name: (path / name).read_bytes() for name in (WEIGHTS, CONFIG)}
        card: Any = ModelCard((path / CARD).read_text(encoding="utf-8")).data
        said, measured = card.to_dict()["dtlctl"], float(card.eval_results[0].metric_value)
        config = json.loads(blobs[CONFIG])
        hashes = {"weights_sha256": said["weights"], "config_sha256": said["config"]}
        told = config["weights_sha256"]
    except Exception as error:  # a stranger's YAML and JSON may end in any
        raise CheckpointError(f"{path}: not a folder that dtlctl exported ({' '.join(str(error).split())})") from None
    for name, key in ((WEIGHTS, "weights_sha256"), (CONFIG, "config_sha256")):
        for place, expected in ((CARD, hashes[key]), *([(CONFIG, told)] if name == WEIGHTS else [])):
            if (found := _hash(blobs[name])) != expected:
                raise CheckpointError(f"{path / name}: not the file of this card\nSHA-256 {found}; {place}: {expected}")
    if experiment is None:
        return hashes
    model = export.load(path)
    if list(experiment.data.classes("target")) != config["classes"]:
        raise CheckpointError(f"{path / CONFIG}: its classes are not those of data.target in {experiment.source}")
    model.precision = experiment.recipe.precision
    with precision(model.precision):
        found = experiment.trainer.measured(model.to(experiment.engine.device), {"acc_t": ("target", "target")})[
            "acc_t"
        ]
    if f"{found:.9g}" != f"{measured:.9g}":
        raise CheckpointError(f"{path / CARD}: Acc_t is {found:.9g} on this recipe's test split, not {measured:.9g}")
    return {**hashes, "acc_t": found}


def _card(
    experiment: Experiment, model: str, document: dict[str, Any], described: dict[str, Any], hashes: dict[str, str]
) -> str:
    """The model card as Markdown, its metadata before it."""
    from huggingface_hub import EvalResult, ModelCardData

    recipe, evidence = experiment.recipe, document["evidence"]
    own, code = evidence[model], _code(described)
    task: Any = {"task_type": "image-classification", "dataset_type": "target"}
    results = [EvalResult(dataset_name="target", metric_type="accuracy", metric_name="Acc_t, %",
                          metric_value=own["acc_t"], **task)]  # fmt: skip
    for name, attack in own["attacks"].items():
        results.append(EvalResult(dataset_name=name, metric_type="accuracy", metric_value=attack["accuracy"]["value"],
                                  metric_name=f"Acc_pl, %, of an attacker ({attack['attacker']})",
                                  task_type="image-classification", dataset_type="piggyback"))  # fmt: skip
    data = ModelCardData(
        model_name=f"{recipe.name}-{model}",
        library_name="timm" if described["arch"].startswith(TIMM) else "torchvision" if code else "dtlctl",
        pipeline_tag="image-classification",
        tags=["disposable-transfer-learning"],
        eval_results=results,
        dtlctl=hashes,
    )
    sidecars = {result.job.model: result.sidecar for result in results_of(experiment.folder, recipe)
                if result.job.makes_model}  # fmt: skip
    audit = next((row["audit_auc"] for row in document["rows"] if row["model"] == model and "audit_auc" in row), None)
    never = [other for other in ("TL", "TGT", "scratch") if not evidence.get(other, {}).get("attacks")]
    gaps = [f"{', '.join(never)} {'was' if len(never) == 1 else 'were'} never attacked."] if never else []
    gaps += ["Membership inference: no audit of this model has a number."] if audit is None else []
    page = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)  # no markup
    return page.from_string(Path(__file__).with_name("card.md.j2").read_text(encoding="utf-8")).render(
        card_data=data.to_yaml(),
        title=data.model_name,
        model=model,
        arch=described["arch"],
        classes=len(described["classes"]),
        size=described["image_size"],
        what=_what(model),
        sentences=document["verdict"]["sentences"],
        table=render([_table(evidence, model)]).strip(),
        audit=audit,
        attacked=own["attacks"],
        attackers=pages.who(document["recipe"]["piggyback"]) if own["attacks"] else "",
        code=code,
        preprocessing=PICTURE,
        lineage=_lineage(experiment, sidecars, model, hashes),
        gaps=[*gaps, *UNMEASURED],
    )


def _what(model: str) -> str:
    words = {"TGT": "Trained on the target alone (TGT).", "TL": "Transfer-learned (TL), without disposal."}
    return words.get(model, f"A disposal of the transfer-learned network TL ({model}).")


def _table(evidence: dict[str, Any], model: str) -> Table:
    """This model first, then what stands beside it."""
    names = list(dict.fromkeys(name for one in evidence.values() for name in one["attacks"]))
    others = [other for other in evidence if other != model and (other in ("scratch", "TGT", "TL") or "acc_t" not in
                                                                 evidence[other])]  # fmt: skip
    rows = []
    for one in (model, *others):
        own = evidence[one]
        cells = ["–"]
        if "acc_t" in own:
            known = accuracy([own["acc_t"]], [own["images"]], [[]]) if own["images"] else None
            cells = [_shown(own["acc_t"], known.low, known.high) if known else f"{own['acc_t']:.1f} (no interval)"]
        attacks = [own["attacks"].get(name, {}).get("accuracy") for name in names]
        rows.append([one, *cells, *(_shown(**attack) if attack else "–" for attack in attacks)])
    return Table("", ["Model", "Acc_t", *names], rows)


def _shown(value: float, low: float | None, high: float | None) -> str:
    return f"{value:.1f}" + (" (no interval)" if low is None else f" [{low:.1f}, {high:.1f}]")


def _code(described: dict[str, Any]) -> str:
    """How plain torchvision or timm loads it; nothing where neither can."""
    arch, count = described["arch"], len(described["classes"])
    if described["width"] or (arch.startswith("resnet") and arch[6:] not in ("10", "18", "34", "50", "101", "152")):
        return ""
    if arch.startswith(TIMM):
        options = "".join(f", {name}={value}" for name, value in timm_options(arch, described["image_size"]).items())
        made = f'timm.create_model("{arch.removeprefix(TIMM)}", num_classes={count}{options})'
        return "\n".join(["import timm, torch", LOADING[0], f"model = {made}", *LOADING[1:]])
    size = f", image_size={described['image_size']}" if arch.startswith("vit_") else ""
    made = f'torchvision.models.get_model("{arch}", num_classes={count}{size})'
    if arch == "resnet10":
        made = f"torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes={count})"
    lines = ["import torch, torchvision", LOADING[0], f"model = {made}"]
    if described["stem"] == "small":
        lines += [
            "model.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)",
            "model.maxpool = torch.nn.Identity()",
        ]
    return "\n".join([*lines, *LOADING[1:]])


def _lineage(experiment: Experiment, sidecars: dict[str, Any], model: str, hashes: dict[str, str]) -> dict[str, str]:
    """Hashes by what they are of; no name or place of any data."""
    own = sidecars[model]
    recipe = (experiment.folder / "recipe.json").read_bytes()
    found = {f"SHA-256 of {name}": digest for name, digest in zip((WEIGHTS, CONFIG), hashes.values(), strict=True)}
    found |= {"SHA-256 of the recipe, every setting": _hash(recipe), "key of the result": own["key"]}
    found |= {f"SHA-256 of the weights of {parent}": digest for parent, digest in own["parent"].items()}
    for adopted, one in sidecars.items():
        if "weights" in one and adopted in (model, "TL", "pre"):
            found[f"weights from outside that {adopted} is"] = (
                one["weights"].get("sha256") or one["weights"]["torchvision"]
            )
    for role, one in own["data"].items():
        found |= {f"images of the {role}, {split}": one[split] for split in ("train", "test")}
    return found


def _hash(blob: bytes) -> str:
    return hashlib.sha256(blob).hexdigest()
