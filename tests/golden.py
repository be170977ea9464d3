"""Checkpoints whose outputs the original projects' own code recorded, made from their formula.

See tests/data/README.md for where the numbers come from.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

DOME272 = Path(__file__).parent / "data" / "dome272"
GOLDEN = Path(__file__).parent / "data" / "golden"


def weights() -> dict[str, NDArray[np.float32]]:
    """Makes every tensor of the 23 M network, bit for bit as the original had them."""
    table = json.loads((DOME272 / "weights.json").read_text(encoding="utf-8"))
    made = {
        key: _uniform(table["seed_prefix"] + key, shape, offset, amp)
        for key, shape, offset, amp in table["weights"]
    }
    digest = hashlib.sha256()
    for key, value in sorted(("/" + key, value) for key, value in made.items()):
        digest.update(f"{key}|{value.dtype.name}|{list(value.shape)}\n".encode())
        digest.update(value.tobytes())
    assert digest.hexdigest() == table["digest"]
    return made


def write_checkpoint(path: Path) -> Path:
    """Writes them as dome272's code does: a bare state dict."""
    torch.save({key: torch.from_numpy(value) for key, value in weights().items()}, path)
    return path


def _uniform(seed: str, shape: list[int], offset: float, amp: float) -> NDArray[np.float32]:
    """Draws uniform numbers by hashing their index (splitmix64) with the seed's CRC."""
    count = math.prod(shape)
    base = np.uint64(zlib.crc32(seed.encode()) * 0x9E3779B97F4A7C15 % 2**64)
    with np.errstate(over="ignore"):
        z = base + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0xD1342543DE82EF95)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    unit = (z >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1.0
    return (offset + amp * unit).astype(np.float32).reshape(shape)


def make_variant(variant: str, out: Path) -> Path:
    """Writes the checkpoint files of a variant in tests/data/golden, as its project writes them.

    Args:
        variant: Its folder, `family/name`.
        out: Where to.
    """
    folder = GOLDEN / variant
    table = json.loads((folder / "table.json").read_text(encoding="utf-8"))
    for file in table["files"]:
        path = out / file["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        match file["kind"]:
            case "copy":
                path.write_bytes((folder / file["from"]).read_bytes())
            case "safetensors":
                entries = table["tensors"][file["tensors"]]
                arrays = {entry["key"]: _entry(entry, folder) for entry in entries}
                save_file(arrays, path, metadata={"format": "pt"})
            case _:
                torch.save(_tree(file["tree"], table, folder), path)
    return out


def _tree(node: Any, table: dict[str, Any], folder: Path) -> Any:
    """Makes an object of its description: JSON, in which `$tensors` and the like stand for data."""
    match node:
        case list():
            made: Any = [_tree(each, table, folder) for each in node]
        case {"$tensors": name, **more}:
            wrap = torch.nn.Parameter if more.get("parameter") else lambda tensor: tensor
            made = OrderedDict(
                (entry["key"], wrap(torch.from_numpy(_entry(entry, folder))))
                for entry in table["tensors"][name]
            )
        case {"$tensor": entry}:
            made = torch.from_numpy(_entry(entry, folder))
        case {"$intdict": entries}:
            made = {int(key): _tree(each, table, folder) for key, each in entries.items()}
        case {"$tuple": entries}:
            made = tuple(_tree(each, table, folder) for each in entries)
        case dict():
            made = {key: _tree(each, table, folder) for key, each in node.items()}
        case _:
            made = node
    return made


def _entry(entry: dict[str, Any], folder: Path) -> NDArray[Any]:
    if "npz" in entry:
        with np.load(folder / entry["npz"]) as file:
            array = np.array(file[entry["name"]])
    elif "value" in entry:
        array = np.full(entry["shape"], entry["value"], dtype=entry["dtype"])
    else:
        array = _uniform(entry["seed"], entry["shape"], entry["offset"], entry["amp"])
    assert list(array.shape) == entry["shape"], entry["key"]
    return np.array(array.astype(entry["dtype"]))
