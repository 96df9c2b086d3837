#!/bin/sh
# Does the package work with the lowest versions that pyproject.toml allows?   tests/lowest.sh [PYTHON]
# Run by hand where a bound or the use of a library changes: it fetches gigabytes. pytest does not run it.
set -eu
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${1:-python3.10}" -m venv "$work/env"
PATH="$work/env/bin:$PATH"
python - > "$work/lowest.txt" <<'END'
import re
from pathlib import Path

for name, version in re.findall(r'"([\w-]+)>=([\d.]+)', Path("pyproject.toml").read_text()):
    print(f"{name}=={version}")
END
pip install --quiet --editable ".[test]" --constraint "$work/lowest.txt"
pip list --format freeze

export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 DTLCTL_CACHE="$work/cache" OMP_NUM_THREADS=1
cat > "$work/tiny.toml" <<'END'
name = "tiny"
model = { arch = "resnet8", width = 4, image_size = 8 }
data.source = { path = "builtin:digits", fraction = 0.1 }
data.target = { path = "builtin:digits", fraction = 0.05 }
data.piggyback.again = { like = "source", fraction = 0.05 }
pretrain = { steps = 4, batch_size = 20 }
finetune = { steps = 4, batch_size = 10 }
dispose.gc = { steps = 4, batch_size = 8, unlearn = { kind = "gradient-collision" } }
piggyback = { steps = 3, batch_size = 10 }
audit = { attacks = ["loss", "adv-dist", "grad-w", "grad-x", "wb", "rmia"], repeats = 2, references = 2, adv_steps = 5 }
END
dtlctl --help > /dev/null
dtlctl check "$work/tiny.toml"
dtlctl run "$work/tiny.toml" --out "$work/runs"
dtlctl export "$work/tiny.toml" --out "$work/runs" --model gc --to "$work/gc.safetensors"
ruff check .  # mypy is left out: it would judge the old packages' own types
pytest -n 2 tests/recipe tests/data tests/cli tests/report
