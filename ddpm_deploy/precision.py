"""What a network computes in, and what an ONNX file in mixed precision says of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from ddpm_deploy.arrays import Array, Samples
from ddpm_deploy.errors import SpecError

METADATA_KEY = "ddpm_deploy.precision"
"""Key in an ONNX file's `metadata_props` under which one in mixed precision says so."""

ALIKE = 120.0
"""Decibels that are recorded where all numbers agree."""

Half = Literal["fp16", "bf16"]
Precision = Literal["fp32", "fp16", "bf16", "int8"]


@dataclass(frozen=True, kw_only=True)
class LoopRecord:
    """What a whole sampling loop of a graph gave, beside that of float32 on the same noise.

    Attributes:
        psnr: Of the worst image, in decibels.
        budget: The least that was allowed.
        sampler: The loop's.
        steps: Its transitions.
        images: That were drawn.
        seed: Of their noise.
        calibration: What the ranges of the numbers were taken from, in words.
    """

    psnr: float
    budget: float
    sampler: str
    steps: int
    images: int
    seed: int
    calibration: str

    def in_words(self) -> str:
        """Returns it as a line for people."""
        return (
            f"{self.psnr:.1f} dB from float32 at the worst of {self.images} images after "
            f"{self.steps} {self.sampler} steps (seed {self.seed}); {self.budget:g} dB were asked "
            f"for; ranges from {self.calibration}"
        )


@dataclass(frozen=True, kw_only=True)
class PrecisionRecord:
    """What a graph computes in.

    Attributes:
        precision: Of most of it; `fp32` for a graph without half precision.
        groups: How many operators compute in what and why, for people: the reason, then counts.
        error: max |mixed - float32| / max |float32| of the output, as `calibrate` or `quantise`
            measured it; None where nobody did.
        loop: What a whole loop of it gave; None where none was run, as in half precision.
    """

    precision: Precision = "fp32"
    groups: Mapping[str, str] = field(default_factory=dict)
    error: float | None = None
    loop: LoopRecord | None = None

    def to_json(self) -> str:
        """Returns what a mixed graph carries under `METADATA_KEY`."""
        said = asdict(self)
        if self.loop is None:
            del said["loop"]
        return json.dumps(said)


@dataclass(frozen=True, kw_only=True)
class LayerPrecision:
    """What one operator of a graph computes in.

    Attributes:
        name: Of the operator, or of its first output where it has none.
        op_type: Such as `Conv`.
        precision: `fp32`, `fp16`, `bf16` or `int8`; any other type as ONNX calls it.
    """

    name: str
    op_type: str
    precision: str


def read_precision(text: str | None, *, source: str) -> PrecisionRecord:
    """Reads what `PrecisionRecord.to_json` wrote.

    Args:
        text: The value under `METADATA_KEY`; None is what a float32 graph carries.
        source: What to call the file in errors.

    Raises:
        SpecError: It is damaged.
    """
    if text is None:
        return PrecisionRecord()
    try:
        said = json.loads(text)
        precision, groups, error = said["precision"], said.get("groups", {}), said.get("error")
        if precision not in ("fp16", "bf16", "int8"):
            raise ValueError(f"it is {precision!r}")
        if not all(isinstance(text, str) for text in groups.values()):
            raise TypeError("its groups are no texts")
        loop = said.get("loop")
        return PrecisionRecord(
            precision=precision,
            groups=groups,
            error=None if error is None else float(error),
            loop=None if loop is None else _read_loop(loop),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as damage:
        raise SpecError(
            f"{source} says that it is in mixed precision, but not how ({damage!r}).",
            hint="Build it again: ddpm-deploy build unet.onnx --fp16 --runtime onnxruntime",
        ) from damage


def _read_loop(said: Mapping[str, Any]) -> LoopRecord:
    loop = LoopRecord(**said)
    for name in ("psnr", "budget"):
        if not isinstance(getattr(loop, name), (int, float)):
            raise TypeError(f"its {name} is {getattr(loop, name)!r}")
    return loop


def to_fp16(x: Array) -> Samples:
    """Returns float32 numbers rounded to fp16, as float32; infinite beyond 65504."""
    with np.errstate(over="ignore"):
        return x.astype(np.float16).astype(np.float32)


def to_bf16(x: Array) -> Samples:
    """Returns float32 numbers rounded to bf16, as float32; finite ones alone."""
    return _without_bits(x, 16)


def to_tf32(x: Array) -> Samples:
    """Returns float32 numbers rounded to TF32, as float32; finite ones alone."""
    return _without_bits(x, 13)


def _without_bits(x: Array, count: int) -> Samples:
    """Rounds away the last bits of float32's fraction: to the nearest, ties to even."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    odd = (bits >> np.uint32(count)) & np.uint32(1)
    rounded = bits + odd + np.uint32((1 << count - 1) - 1)
    return np.asarray(rounded & np.uint32(2**32 - (1 << count))).view(np.float32)
