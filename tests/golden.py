"""The checkpoint whose outputs dome272's own code recorded, made again from its formula.

See tests/data/README.md for where the numbers come from.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

DOME272 = Path(__file__).parent / "data" / "dome272"


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
