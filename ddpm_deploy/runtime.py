"""What an ONNX file that was built for one runtime says of itself.

A graph that `export` wrote has no such record, and runs in any runtime.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal, get_args

from ddpm_deploy.errors import SpecError
from ddpm_deploy.precision import Precision

METADATA_KEY = "ddpm_deploy.runtime"
"""Key in an ONNX file's `metadata_props` under which an engine says what it was built for."""

FORMAT = 1

Runtime = Literal["onnxruntime", "openvino"]
Arithmetic = Literal["f32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class RuntimeRecord:
    """What an engine was built for.

    Attributes:
        runtime: What opens it.
        precision: What most of it computes in.
        arithmetic: What the operators compute in that no Q/DQ pair makes int8.
        streams: Parts that a batch is cut into, which run side by side; at most one a core.
        best_batch: The batch that was measured to be the fastest; None where nobody measured.
        graph_sha256: Of the graph that it was built from.
        fused: Whether the sampler's step stands behind the network.
        threads: CPU threads that it was measured with; None for one a core.
        budget: Largest error that was allowed; None for the precision's own.
        error: Of its output over the peak, as measured when it was built.
        shift: What each channel of the output was too large by in the mean, and what the engine
            takes off; empty where nobody measured.
        psnr: Of the worst image of a short loop against the graph's in float32, in decibels, where
            the precision is lower.
        milliseconds: Of one image's step in each runtime that was tried, by name; empty where the
            runtime was named.
        machine: Where it was built: the processor and the versions of the runtimes that were there.
    """

    runtime: Runtime
    precision: Precision = "fp32"
    arithmetic: Arithmetic = "f32"
    streams: int = 1
    best_batch: int | None = None
    graph_sha256: str = ""
    fused: bool = False
    threads: int | None = None
    budget: float | None = None
    error: float | None = None
    shift: Sequence[float] = ()
    psnr: float | None = None
    milliseconds: Mapping[str, float] = field(default_factory=dict)
    machine: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """Returns what the engine carries under `METADATA_KEY`."""
        return json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True)


def read_runtime(text: str | None, *, source: str) -> RuntimeRecord | None:
    """Reads what `RuntimeRecord.to_json` wrote; None is what a graph carries.

    Args:
        text: The value under `METADATA_KEY`.
        source: What to call the file in errors.

    Raises:
        SpecError: It is damaged, or of another release.
    """
    if text is None:
        return None
    try:
        said = json.loads(text)
        if said.pop("format") != FORMAT:
            raise ValueError("its format is another release's")
        record = RuntimeRecord(**{**said, "shift": tuple(said.get("shift", ()))})
        _check(record)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as damage:
        raise SpecError(
            f"{source} says that it was built for one runtime, but not how ({damage!r}).",
            hint="Build it again here: ddpm-deploy build unet.onnx",
        ) from damage
    return record


def _check(record: RuntimeRecord) -> None:
    for name, value, known in (
        ("runtime", record.runtime, get_args(Runtime)),
        ("precision", record.precision, get_args(Precision)),
        ("arithmetic", record.arithmetic, get_args(Arithmetic)),
    ):
        if value not in known:
            raise ValueError(f"its {name} is {value!r}")
    for name, number in (("streams", record.streams), ("best_batch", record.best_batch)):
        if not (type(number) is int and number >= 1) and not (
            name == "best_batch" and number is None
        ):
            raise ValueError(f"its {name} is {number!r}")
    said = [each for each in (record.budget, record.error, record.psnr) if each is not None]
    numbers = [*record.milliseconds.values(), *record.shift, *said]
    texts = [record.graph_sha256, *record.machine.values()]
    if not all(type(number) in {int, float} for number in numbers):
        raise TypeError(f"{numbers} are not all numbers")
    if not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{texts} are not all texts")
