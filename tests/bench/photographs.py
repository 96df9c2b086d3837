"""JPEGs as a camera's are, for `dtlctl bench --train`.

`python tests/bench/photographs.py ../shared/data/tin100 FOLDER`: 500 training images and 20 to test on, enlarged from
a parquet file's to 500 x 375 pixels, with some noise.
"""

import io
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
from PIL import Image

if __name__ == "__main__":
    rng = np.random.default_rng(0)
    for split, count in (("train", 500), ("test", 20)):
        table = pyarrow.parquet.read_table(f"{sys.argv[1]}/{split}.parquet")
        rows = np.linspace(0, len(table) - 1, count).astype(int)
        for number, row in enumerate(table.take(rows).to_pylist()):
            path = Path(sys.argv[2]) / split / str(number % 10) / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB").resize((500, 375), Image.BICUBIC)
            noisy = np.asarray(picture) + rng.normal(0, 8, (375, 500, 3))
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)
