"""Files that are wrong on purpose: (what, run the command that meets them, exit codes that are right)."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from tests.reliability.fork import Outcome, call

if TYPE_CHECKING:
    from tests.reliability.bench import Bench

PICKLE = b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x94\x93\x94."
Case = tuple[str, Callable[[], Outcome], tuple[int, ...]]


def picture(kind: str = "PNG", size: int = 8) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(size * size * 3, dtype=np.uint8).reshape(size, size, 3)).save(file, kind)
    return file.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a hundred bytes that claims to be huge."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 4)) + chunk(b"IEND", b"")


IMAGES: dict[str, bytes] = {
    "a pixel that claims 50,000 x 50,000": bomb(50_000, 50_000),
    "a pixel that claims 12,000 x 12,000": bomb(12_000, 12_000),
    "a pixel that claims 2,147,483,647 x 1": bomb(2**31 - 1, 1),
    "a pixel that claims 0 x 0": bomb(0, 0),
    "a pixel that claims 1,000 x 1,000": bomb(1000, 1000),
    "truncated PNG": picture()[:50],
    "truncated JPEG": picture("JPEG", 64)[:400],
    "truncated GIF": picture("GIF")[:40],
    "truncated WEBP": picture("WEBP", 64)[:60],
    "zero bytes": b"",
    "text": b"this is no picture",
    "HTML": b"<html><script>alert(1)</script></html>",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(/etc/passwd) (r) file\n",
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg' width='8' height='8'/>",
    "a pickle": PICKLE,
    "PNG header alone": b"\x89PNG\r\n\x1a\n",
    "random bytes after a JPEG marker": b"\xff\xd8\xff\xe0" + bytes(range(256)),
}


def datasets(bench: Bench) -> Iterator[Case]:
    for number, (what, blob) in enumerate(IMAGES.items()):
        yield f"image: {what}", lambda n=number, b=blob: _with_image(bench, f"images-{n}", b), (4,)
    for number, (what, change) in enumerate(TABLES.items()):
        yield f"parquet: {what}", lambda n=number, c=change: _with_table(bench, f"table-{n}", c), (4,)


def _with_image(bench: Bench, name: str, blob: bytes) -> Outcome:
    """A folder of two classes in which one picture is the blob."""
    root = bench.folder / name
    for split in ("train", "test"):
        for kind in ("a", "b"):
            (root / split / kind).mkdir(parents=True)
            for number in range(6):
                (root / split / kind / f"{number}.png").write_bytes(picture())
    (root / "train" / "a" / "3.png").write_bytes(blob)
    return _pretrain(bench, name)


def _pretrain(bench: Bench, data: str, *more: str) -> Outcome:
    change = ["--set", f"data.source.path=./{data}", "--set", f"name={data}", "--set", "data.source.fraction=1.0"]
    return call("pretrain", "tiny.toml", "--quiet", *change, *more, folder=bench.folder)


def _cells(blob: Any = None) -> list[Any]:
    return [{"bytes": picture() if blob is None else blob, "path": None} for _ in range(8)]


TABLES: dict[str, Callable[[], dict[str, Any]]] = {
    "image column of numbers": lambda: {"image": list(range(8)), "label": [0, 1] * 4},
    "image column of text": lambda: {"image": ["x"] * 8, "label": [0, 1] * 4},
    "image cells of nothing": lambda: {"image": [None] * 8, "label": [0, 1] * 4},
    "image cells that name other files": lambda: {
        "image": [{"bytes": None, "path": "/etc/passwd"}] * 8,
        "label": [0, 1] * 4,
    },
    "image cells that are bombs": lambda: {"image": _cells(bomb(50_000, 50_000)), "label": [0, 1] * 4},
    "labels that are floats": lambda: {"image": _cells(), "label": [0.5, 1.5] * 4},
    "labels that are lists": lambda: {"image": _cells(), "label": [[0], [1]] * 4},
    "labels that are nothing": lambda: {"image": _cells(), "label": [None] * 8},
    "labels of one class": lambda: {"image": _cells(), "label": [1] * 8},
    "no label column": lambda: {"image": _cells()},
    "no rows": lambda: {"image": [], "label": []},
    "not parquet": dict,
    "truncated parquet": lambda: {"image": _cells(), "label": [0, 1] * 4, "": []},
}


def _with_table(bench: Bench, name: str, change: Callable[[], dict[str, Any]]) -> Outcome:
    import pyarrow as pa
    import pyarrow.parquet as pq

    root = bench.folder / name
    root.mkdir()
    columns = change()
    cut = columns.pop("", None) is not None
    for split in ("train", "test"):
        file = root / f"{split}.parquet"
        if columns:
            pq.write_table(pa.table(columns), file)
        else:
            file.write_bytes(b"PAR1 this is not parquet PAR1")
        if cut:
            os.truncate(file, file.stat().st_size // 2)
    return _pretrain(bench, name, "--set", "data.source.image=image", "--set", "data.source.label=label")


def checkpoints(bench: Bench) -> Iterator[Case]:
    """A damaged or foreign parent: `finetune` meets it."""

    def case(change: Callable[[Path], None]) -> Callable[[], Outcome]:
        def run() -> Outcome:
            name = bench.fresh(without="finetune/model")
            change(bench.run(name) / "pretrain")
            return bench.call("TL", name)

        return run

    for what, change in {**WEIGHTS, **SIDECARS}.items():
        yield f"checkpoint: {what}", case(change), (4,)


def _rewrite(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change the weights, and the hash in the sidecar with them, as a stranger could."""

    def apply(folder: Path) -> None:
        from safetensors.torch import load, save

        weights, sidecar = folder / "model.safetensors", folder / "model.json"
        tensors = load(weights.read_bytes())
        change(tensors)
        blob = save(tensors)
        weights.write_bytes(blob)
        _say(blob)(sidecar)

    return apply


def _say(blob: bytes) -> Callable[[Path], None]:
    return _edit(lambda d: d.update(weights_sha256=hashlib.sha256(blob).hexdigest()))


def _edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(sidecar: Path) -> None:
        document = json.loads(sidecar.read_text())
        change(document)
        sidecar.write_text(json.dumps(document))

    return apply


def _raw(blob: bytes) -> Callable[[Path], None]:
    """The weights file is this; the sidecar says so."""

    def apply(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(blob)
        _say(blob)(folder / "model.json")

    return apply


FIRST = "backbone.stem.0.weight"
WEIGHTS: dict[str, Callable[[Path], None]] = {
    "weights truncated": lambda f: os.truncate(f / "model.safetensors", 1000),
    "weights with one bit changed": lambda f: _flip(f / "model.safetensors"),
    "weights missing": lambda f: (f / "model.safetensors").unlink(),
    "weights of another model": lambda f: _copy(f.parent / "dispose/gc/model.safetensors", f / "model.safetensors"),
    "weights with NaN": _rewrite(lambda t: t[FIRST].fill_(float("nan"))),
    "weights with infinity": _rewrite(lambda t: t[FIRST].fill_(float("inf"))),
    "a tensor missing": _rewrite(lambda t: t.pop(FIRST)),
    "a tensor too many": _rewrite(lambda t: t.update(extra=t[FIRST].clone())),
    "a tensor of another shape": _rewrite(lambda t: t.update({FIRST: t[FIRST][:1].clone()})),
    "a tensor of another type": _rewrite(lambda t: t.update({FIRST: t[FIRST].double()})),
    "an empty file": _raw(b""),
    "a header of 2^63 bytes": _raw(b"\xff" * 7 + b"\x7f" + b"{}"),
    "a header of 200 MB": _raw(struct.pack("<Q", 200_000_000) + b" " * 64),
    "a header that is no JSON": _raw(struct.pack("<Q", 8) + b"nonsense"),
    "a header that is a list": _raw(struct.pack("<Q", 2) + b"[]"),
    "offsets beyond the end": _raw(
        struct.pack("<Q", 64) + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'.ljust(64)
    ),
    "a pickle": _raw(PICKLE),
    "an archive with a pickle": _raw(b"PK\x03\x04" + b"\0" * 100),
}


def _flip(path: Path) -> None:
    blob = bytearray(path.read_bytes())
    blob[-1] ^= 1
    path.write_bytes(blob)


def _copy(source: Path, goal: Path) -> None:
    shutil.copyfile(source, goal)


def _sidecar(blob: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / "model.json").write_bytes(blob)


def _field(**change: Any) -> Callable[[Path], Any]:
    return lambda folder: _edit(lambda d: d.update(change))(folder / "model.json")


SIDECARS: dict[str, Callable[[Path], Any]] = {
    "sidecar empty": _sidecar(b""),
    "sidecar truncated": lambda f: os.truncate(f / "model.json", 100),
    "sidecar a list": _sidecar(b"[]"),
    "sidecar a number": _sidecar(b"1"),
    "sidecar null": _sidecar(b"null"),
    "sidecar not UTF-8": _sidecar(b'{"format": 1, "key": "\xe9"}'),
    "sidecar of 100,000 brackets": _sidecar(b"[" * 100_000),
    "sidecar with NaN": _sidecar(b'{"format": 1, "wall_seconds": NaN}'),
    "sidecar with a number of 5,000 digits": _sidecar(b'{"format": ' + b"9" * 5000 + b"}"),
    "sidecar missing": lambda f: (f / "model.json").unlink(),
    "sidecar a folder": lambda f: ((f / "model.json").unlink(), (f / "model.json").mkdir()),
    "format of tomorrow": _field(format=2),
    "format as text": _field(format="1"),
    "key of something else": _field(key="0" * 64),
    "key a list": _field(key=[]),
    "key missing": lambda f: _edit(lambda d: d.pop("key"))(f / "model.json"),
    "hash a number": _field(weights_sha256=3),
    "hash a path": _field(weights_sha256="../../x"),
    "hash missing": lambda f: _edit(lambda d: d.pop("weights_sha256"))(f / "model.json"),
    "hash of something else": _field(weights_sha256="0" * 64),
    "parent a list": _field(parent=[]),
    "metrics text": _field(metrics="good"),
    "history a number": _field(history=1),
    "heads a list": _field(heads=[1]),
    "heads with a name of dots": _field(heads={"a.b": 3}),
    "heads with a name of 300": _field(heads={"a" * 300: 3}),
    "heads with 10^12 classes": _field(heads={"source": 10**12}),
    "heads with -1 classes": _field(heads={"source": -1}),
    "heads with 1.5 classes": _field(heads={"source": 1.5}),
    "heads with other classes": _field(heads={"source": 11}),
    "heads missing": lambda f: _edit(lambda d: d.pop("heads"))(f / "model.json"),
}


def states(bench: Bench) -> Iterator[Case]:
    """A damaged state of an unfinished training: the same command meets it. One for another recipe is not used."""

    def case(change: Callable[[Path], Any]) -> Callable[[], Outcome]:
        def run() -> Outcome:
            name = bench.fresh(without="pretrain/model")
            assert bench.call("pre", name, fault="step:6=term").code == 143
            change(bench.run(name) / "pretrain/model.resume/state.safetensors")
            return bench.call("pre", name)

        return run

    def metadata(**changes: Any) -> Callable[[Path], None]:
        def apply(path: Path) -> None:
            from safetensors.torch import load, save

            blob = path.read_bytes()
            length = int.from_bytes(blob[:8], "little")
            document = json.loads(json.loads(blob[8 : 8 + length])["__metadata__"]["dtlctl"])
            path.write_bytes(save(load(blob), {"dtlctl": json.dumps({**document, **changes})}))

        return apply

    yield "state: truncated", case(lambda p: os.truncate(p, 5000)), (4,)
    yield "state: one bit changed", case(_flip), (4,)
    yield "state: empty", case(lambda p: p.write_bytes(b"")), (4,)
    yield "state: a pickle", case(lambda p: p.write_bytes(PICKLE)), (4,)
    yield "state: step a text", case(metadata(step="6")), (4,)
    yield "state: step negative", case(metadata(step=-6)), (4,)
    yield "state: no learning rate", case(metadata(lrs=[])), (4,)
    yield "state: more sums than numbers", case(metadata(sums=["a", "b", "c"])), (4,)
    yield "state: no processes", case(metadata(processes=0)), (4,)
    yield "state: unknown field", case(metadata(code="import os")), (4,)
    yield "state: rows of text", case(metadata(rows=[{"step": "x"}])), (4,)
    yield "state: of another key", case(metadata(key="0" * 64)), (0,)
