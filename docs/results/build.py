"""Write what the stored results say into the pages: every table, and every number in a sentence.

    python docs/results/build.py           # rewrites the pages and the figures
    python docs/results/build.py --check   # exit code 1 where one is stale, or where no page uses a line of data

A page holds `<!--=EXPRESSION-->TEXT<!--/-->`. EXPRESSION is Python, and has the public methods of `Data` and a few
names; TEXT is what it gives. data/NAME.jsonl has one line a result: study, model, seed, stage, and those fields of the
result's sidecar that are shown. WHO in an expression is "study/model", or "study/model@λ" where a study has several.
Accuracies are in %; ± is the half width of the 95 % t interval over seeds; differences are taken seed by seed.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
PAGES = {FOLDER / f"{name}.md": name for name in ("disposal", "parts", "transfer", "collision", "membership")}
PAGES[ROOT / "README.md"] = "disposal"
"""Every page, and the name of its data."""
MARKER = re.compile(r"<!--=(.*?)-->(.*?)<!--/-->", re.DOTALL)
DATASETS = {"own": "tin100-10", "others": "tin20b"}
"""The attacker's on photographs: a tenth of the source's images, and 20 classes that no model was trained on."""
ATTACKERS = {"tuned": "acc_pl_worst", "one": "acc_pl", "best": "acc_pl_max"}
"""The field of: the attacker best on images that he holds out, the one setting, and the best of all in the test.

Any other name is that of an attack made later on the same model, by a tuned attacker of that kind alone.
"""
LABELS = {
    "scratch": "new network", "TGT": "target alone", "TGT-500": "never saw the source, 500 images",
    "TGT-2500": "never saw the source, 2,500 images", "pre": "pre-trained", "gc": "gradient collision",
    "rand": "random labels", "unif": "uniform answers", "neg": "negative CE", "null": "null-space",
    "null-3": "null-space, three passes", "equal": "as good, never saw the source",
    "null-new": "null-space, new network, three passes", "null-new-6": "null-space, new network, six passes",
    "control": "no unlearning loss", "distilled": "new network, distilled", "fresh": "fresh stages alone",
    "distilled-t4": "new network, distilled at T = 4", "rand-t4": "random labels at T = 4",
    "null-t4": "null-space at T = 4", "null-fresh": "null-space, fresh stages",
    "rand-tgt": "random labels, target's images", "null-tgt": "null-space, target's images",
    "rand-both": "random labels, both", "fresh-both": "fresh stages alone, both",
    "rand-fresh": "random labels, fresh stages, both", "null-both": "null-space, fresh stages, both",
    "lr-0.01": "learning rate 0.01", "lr-0.1": "learning rate 0.1", "gc-src-kd": "distilled on source images",
    "gc-tgt-kd": "distilled on target images", "gc-tgt-ce": "target labels",
    "gc-0.9": "gradient collision, λ ≤ 0.9", "gc-6": "gradient collision, six passes",
    "gc-chunks": "gradient collision, two chunks", "gc-t1": "gradient collision, T = 1",
    "gc-3": "gradient collision, three passes", "gc-two": "gradient collision, two fresh stages",
    "gc-tl": "gradient collision, from TL", "sim": "simulated attacker", "regrown": "no unlearning loss, grown anew",
    "gc-tgt-a-gem": "A-GEM on target images",
}  # fmt: skip
"""A model in a table: its unlearning loss, fresh stages, and whose images retain, where not the source's alone."""
GREY, BLUE, GREEN = "#555b63", "#0072b2", "#00805a"
POINTS = {
    "stages/TL": ("TL, published as it is", GREY, (24.0, 3.4)),
    "stages/rand": ("random labels,\nfresh stages", BLUE, (23.0, -6.0)),
    "stages/null-3": ("null-space,\nfresh stages", GREEN, (16.5, 4.6)),
    "anew/null-new": ("null-space,\nnew network", GREEN, (12.0, 4.6)),
    "stages/TGT": ("target alone, without transfer learning", GREY, (15.0, -13.0)),
}
"""In the first figure: label, colour, and the place of the label."""
STRENGTHS = {"TL": GREY, "regrown": "#d55e00", "rand": BLUE, "null-3": GREEN, "TGT": "#cc79a7", "scratch": "#b8a500"}
BUDGETS = (1, 5, 20, 46)
"""In the second: models with their colours, and how many settings the attacker tried."""


class Seeds(dict[int, float]):
    """A number by seed; printed as its mean ± the half width of the 95 % t interval, or alone for one seed."""

    def __sub__(self, other: Seeds) -> Seeds:
        if not self.keys() <= other.keys():
            raise ValueError(f"seeds {sorted(self)} against {sorted(other)}")
        return Seeds({seed: value - other[seed] for seed, value in self.items()})

    @property
    def mean(self) -> float:
        return mean(self.values())

    @property
    def half(self) -> float:
        from scipy.stats import t

        return float(t.ppf(0.975, len(self) - 1)) * stdev(self.values()) / len(self) ** 0.5

    @property
    def each(self) -> str:
        return ", ".join(map(tenth, self.values()))

    @property
    def tight(self) -> str:
        return str(self).replace(" ", "")

    def __str__(self) -> str:
        return f"{tenth(self.mean)} ± {self.half:.1f}" if len(self) > 1 else tenth(self.mean)


def tenth(value: float) -> str:
    """With one decimal, and no minus before nothing."""
    return f"{round(value, 1) + 0.0:.1f}"


def label(who: str) -> str:
    return LABELS.get(model := re.split("[/@]", who)[1], model)


class Data:
    """The lines of one data file, and what a page can say of them."""

    def __init__(self, name: str) -> None:
        self.path = FOLDER / "data" / f"{name}.jsonl"
        self.lines = [json.loads(line) for line in self.path.read_text("utf-8").splitlines()]
        self.used: set[int] = set()

    def of(self, who: str, field: str, **where: Any) -> Seeds:
        """A field of WHO by seed, from the lines that have what `where` says."""
        study, model, *lam = re.split("[/@]", who)
        where |= {"study": study, "model": model} | ({"lambda": float(lam[0])} if lam else {})
        found = Seeds()
        for number, line in enumerate(self.lines):
            if field in line and all(line.get(key) == value for key, value in where.items()):
                if line["seed"] in found:
                    raise ValueError(f"{self.path.name}: two results have {field} of {who}, {where}")
                found[line["seed"]] = line[field]
                self.used.add(number)
        if not found:
            raise LookupError(f"{self.path.name}: no result has {field} of {who}, {where}")
        return found

    def acc_t(self, who: str) -> Seeds:
        return self.of(who, "acc_t", step=None)

    def kept(self, who: str) -> Seeds:
        """Target accuracy on test images against TL's of the same study, which WHO was made from."""
        return self.acc_t(who) - self.acc_t(who.partition("/")[0] + "/TL")

    def price(self, who: str, stage: str = "dispose") -> str:
        """Points of target accuracy lost on the validation images that chose λ; stage "compare": λ was only tried."""
        return tenth(self.of(who, "drop", stage=stage).mean)

    def lam(self, who: str) -> str:
        (value,) = set(self.of(who, "lambda", stage="dispose").values())
        return f"{value:.3g}"

    def pl(self, who: str, dataset: str, attacker: str = "tuned") -> Seeds:
        """What an attacker gets."""
        kind = None if attacker in ATTACKERS else attacker
        return self.of(who, ATTACKERS.get(attacker, "acc_pl_worst"), stage="piggyback", dataset=dataset, attack=kind)

    def taken(self, who: str, dataset: str, attacker: str = "tuned") -> Seeds:
        """What he gets less than from TL of the same study."""
        return self.pl(who.partition("/")[0] + "/TL", dataset, attacker) - self.pl(who, dataset, attacker)

    def share(self, who: str, dataset: str, zero: str = "scratch") -> str:
        """In %, with its interval, of what TL gives a tuned attacker beyond a new network.

        Or beyond another `zero`: a model of the same study, or WHO.
        """
        from dtlctl.report.intervals import Number, share

        study = who.partition("/")[0]
        zero = zero if "/" in zero else f"{study}/{zero}"
        three = (self.pl(one, dataset) for one in (who, zero, f"{study}/TL"))
        found = share(*(Number([one[seed] for seed in sorted(one)]) for one in three))
        return "{value:.0f} [{low:.0f}, {high:.0f}]".format(**{key: 100 * value for key, value in found.items()})

    def audit(self, who: str, attack: str = "loss", mode: str = "as-is", field: str = "auc") -> str:
        """The AUC, or the true positives in % at 1 % false ones ("tpr"), on one seed, with its interval."""
        found = (self.of(who, f"{field}{end}", attack=attack, mode=mode).mean for end in ("", "_low", "_high"))
        return ("{:.3f} [{:.3f}, {:.3f}]" if field == "auc" else "{:.1f} [{:.1f}, {:.1f}]").format(*found)

    def table(self, rows: str, columns: dict[str, Callable[[str], object]], name: Callable[[str], str] = label) -> str:
        """A row a WHO, of a list with commas; a dash where a column has no such result."""

        def cell(column: Callable[[str], object], who: str) -> str:
            try:
                return str(column(who))
            except LookupError:
                return "–"

        lines = [["", *columns], [":--", *["--:"] * len(columns)]]
        lines += [[name(who), *(cell(column, who) for column in columns.values())] for who in rows.split(",")]
        return "\n".join(f"|{'|'.join(line)}|" for line in lines)


def written(page: str, data: Data) -> str:
    """The page with what the data say between its markers."""
    names = {name: getattr(data, name) for name in dir(Data) if not name.startswith("_")}
    names |= DATASETS | {"tenth": tenth, "str": str, "label": label, "__builtins__": {}}

    def put(found: re.Match[str]) -> str:
        text = str(eval(found[1], names))  # of our own pages
        if "\n" in text:
            return f"<!--={found[1]}-->\n\n{text}\n\n<!--/-->"
        if re.fullmatch(r"[-*>\s]*", found.string[: found.start()].rpartition("\n")[2]):
            raise ValueError(f"{found[0]}: a line that begins with a comment is no Markdown; put a word before it")
        return f"<!--={found[1]}-->{text}<!--/-->"

    return MARKER.sub(put, page)


def figure(data: Data) -> Any:
    """Target accuracy kept, over what the tuned attacker gets on the source's own classes."""
    drawn, axes = on_a_card()
    axes.set(xlabel="what a tuned attacker gets of the source's own classes (%)", xlim=(5, 30))
    axes.set(ylabel="target accuracy against TL's (points)", ylim=(-18, 8))
    for who, (name, colour, place) in POINTS.items():
        x, y = data.pl(who, DATASETS["own"]), data.kept(who)
        axes.errorbar(x.mean, y.mean, xerr=x.half, yerr=y.half, fmt="o", color=colour, capsize=2, elinewidth=0.6)
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.6}
        axes.annotate(name, (x.mean, y.mean), place, ha="center", va="center", color=colour, size=8, arrowprops=line)
    zero = data.pl("stages/scratch", DATASETS["own"]).mean
    axes.axvline(zero, color=GREY, linewidth=0.8, linestyle=":")
    axes.text(zero + 0.2, -6, "a new network", rotation=90, color=GREY, size=8)
    return drawn


def strength(data: Data) -> Any:
    """What the attacker gets on the source's own classes, over the settings that he tried, of ten kinds."""
    drawn, axes = on_a_card()
    axes.set(xlabel="settings tried, of ten kinds", xscale="log", xlim=(0.9, 150))
    axes.set(ylabel="best on images that choose (%)", ylim=(0, 30))
    for model, colour in STRENGTHS.items():
        found = budgets(data, model)
        mean, half = ([getattr(one, name) for one in found] for name in ("mean", "half"))
        axes.errorbar(BUDGETS, mean, yerr=half, fmt="o-", color=colour, capsize=2, elinewidth=0.6, markersize=4)
        low = -0.5 if model in ("TGT", "regrown") else 0.5 if model == "scratch" else 0
        axes.annotate(LABELS.get(model, model), (52, mean[-1] + low), color=colour, size=8, va="center")
    axes.set_xticks(BUDGETS, map(str, BUDGETS), minor=False)
    axes.minorticks_off()
    return drawn


def budgets(data: Data, model: str) -> list[Seeds]:
    return [data.of(f"kinds/{model}", f"best_of_{tried}", dataset=DATASETS["own"]) for tried in BUDGETS]


def on_a_card() -> tuple[Any, Any]:
    """A figure on a white card, which is read on a dark page too, and its axes."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.patches import FancyBboxPatch

    drawn = Figure(figsize=(7.2, 4.2), layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15))
    axes = drawn.add_subplot()
    drawn.patch.set_alpha(0)
    card = FancyBboxPatch((0.01, 0.01), 0.98, 0.98, "round,pad=0,rounding_size=0.02", fc="white", ec="none", zorder=-9)
    card.set_transform(drawn.transFigure)
    drawn.add_artist(card)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)
    return drawn, axes


FIGURES: dict[str, Callable[[Data], Any]] = {"disposal": figure, "strength": strength}


def stamps(data: Data) -> dict[str, str]:
    """Of the numbers in every figure. They stand in the files, whose other bytes are the version of matplotlib's."""
    points = [[str(data.pl(who, DATASETS["own"])), str(data.kept(who)), str(POINTS[who])] for who in POINTS]
    drawn: dict[str, Any] = {
        "disposal": [points, data.pl("stages/scratch", DATASETS["own"])],
        "strength": [[model, *map(str, budgets(data, model))] for model in STRENGTHS],
    }
    return {name: hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:16] for name, shown in drawn.items()}


def main(check: bool) -> list[str]:
    """Rewrite what is stale, or only say what is: one sentence each."""
    data = {name: Data(name) for name in dict.fromkeys(PAGES.values())}
    wrong = []
    for path, name in PAGES.items():
        old = path.read_text("utf-8")
        if (new := written(old, data[name])) != old:
            wrong.append(f"{path.relative_to(ROOT)} is stale: run docs/results/build.py")
            if not check:
                path.write_text(new, "utf-8")
    for name, stamp in stamps(data["disposal"]).items():
        picture = FOLDER / f"{name}.svg"
        if not picture.exists() or stamp not in picture.read_text("utf-8"):
            wrong.append(f"docs/results/{name}.svg is stale: run docs/results/build.py")
            if not check:
                import matplotlib

                with matplotlib.rc_context({"svg.hashsalt": "disposal", "svg.fonttype": "none"}):
                    FIGURES[name](data["disposal"]).savefig(picture, metadata={"Date": None, "Title": stamp})
    unused = [f"{one.path.name}:{n + 1}" for one in data.values() for n in range(len(one.lines)) if n not in one.used]
    return wrong + [f"docs/results/data/{line} is used by no page" for line in unused]


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    found = main("--check" in sys.argv[1:])
    print("\n".join(found), file=sys.stderr)
    sys.exit("--check" in sys.argv[1:] and bool(found))
