"""The graph that TensorRT reads, made of the graph that `export` wrote: one pass after another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import onnx

from ddpm_deploy.arrays import Samples
from ddpm_deploy.engines.build_settings import BuildSettings
from ddpm_deploy.engines.trt_build import Prepared
from ddpm_deploy.errors import ExportError, MissingDependencyError, SpecError
from ddpm_deploy.export.attention import split_queries
from ddpm_deploy.export.calibrate import calibrate
from ddpm_deploy.export.fuse_step import fuse_step
from ddpm_deploy.export.memory import estimate_memory
from ddpm_deploy.export.onnx_file import load_graph, metadata, write_graph
from ddpm_deploy.export.precision import convert, recorded
from ddpm_deploy.export.quantize import PSNR, quantise
from ddpm_deploy.fused import METADATA_KEY as FUSED_KEY
from ddpm_deploy.fused import is_fused
from ddpm_deploy.precision import METADATA_KEY as PRECISION_KEY
from ddpm_deploy.precision import Precision, read_precision
from ddpm_deploy.spec import ModelSpec

ATTENTION_BYTES = 2**27
"""What one matrix of attention may take on a device, at the largest batch."""


class Header(NamedTuple):
    """What a graph says it is.

    Attributes:
        spec: The network's.
        fused: Whether the sampler's step stands behind it.
        precision: What most of it computes in.
    """

    spec: ModelSpec
    fused: bool
    precision: Precision


def read_header(graph: Path) -> Header:
    """Reads what a graph says it is, not its weights.

    Raises:
        EngineError: It is missing, or no ONNX file.
        SpecError: It carries no spec that this release reads.
    """
    model = load_graph(graph, weights=False)
    said = metadata(model)
    spec = ModelSpec.from_metadata(said, source=str(graph))
    outputs = [value.name for value in model.graph.output]
    if "out" not in outputs:
        raise SpecError(
            f"{graph} gives {', '.join(outputs) or 'nothing'}; the output of a network is `out`.",
            hint="Export the network again: ddpm-deploy export CHECKPOINT",
        )
    precision = read_precision(said.get(PRECISION_KEY), source=str(graph)).precision
    return Header(spec, is_fused(said.get(FUSED_KEY), source=str(graph)), precision)


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """A graph in the precision of a plan.

    Attributes:
        model: The graph.
        changed: Whether it is another than the file's.
        groups: How many operators compute in what, and why; empty in float32.
        error: Of its output over the peak, as measured; None where it was not.
    """

    model: onnx.ModelProto
    changed: bool = False
    groups: Mapping[str, str] = field(default_factory=dict)
    error: float | None = None


def lower_precision(
    graph: Path,
    precision: Precision,
    *,
    budget: float | None = None,
    data: Samples | None = None,
    on_progress: Callable[[str], None] = lambda _: None,
) -> Lowered:
    """Makes a graph mixed, within the budget; a graph that is mixed already is taken as it is.

    Without ONNX Runtime half precision is chosen by rule alone, which `on_progress` is told.

    Args:
        graph: The `.onnx` file that `export` wrote.
        precision: `fp32` leaves the graph as it is.
        budget: As in `calibrate`; for int8 the decibels of `quantise`.
        data: As in `calibrate` and `quantise`.
        on_progress: Told what is being done, in words.

    Raises:
        ExportError: The graph is in another precision already, or its step is fused and it is in
            none, or the budget cannot be kept.
        MissingDependencyError: int8 needs ONNX Runtime, which takes the ranges.
    """
    model = load_graph(graph)
    if precision == "fp32":
        _refuse_lower(graph, model)
        return Lowered(model=model)
    if precision == "int8":
        return _lower_int8(graph, model, psnr=budget, data=data, on_progress=on_progress)
    if (before := recorded(model)) is not None:
        mixed = convert(model, precision)  # refuses the other precision
        return Lowered(model=model, groups=dict(mixed.groups), error=before.error)
    if FUSED_KEY in metadata(model):
        raise ExportError(
            f"{graph} is in float32 with its step fused, and the step stays in float32.",
            hint=f"Start from the graph that export wrote: --{precision} --fuse-step",
        )
    try:
        calibrated = calibrate(graph, precision, budget=budget, data=data, on_progress=on_progress)
    except MissingDependencyError as error:
        on_progress(
            f"note: {precision} was chosen by rule and not measured, for want of ONNX "
            f"Runtime ({error.hint}); ddpm-deploy verify measures the plan"
        )
        mixed = convert(model, precision)
        return Lowered(model=mixed.model, changed=True, groups=dict(mixed.groups))
    mixed = calibrated.mixed
    return Lowered(
        model=mixed.model,
        changed=True,
        groups=dict(mixed.groups),
        error=calibrated.worst,
    )


def _lower_int8(
    graph: Path,
    model: onnx.ModelProto,
    *,
    psnr: float | None,
    data: Samples | None,
    on_progress: Callable[[str], None],
) -> Lowered:
    before = recorded(model)
    if before is not None and before.precision == "int8":
        return Lowered(model=model, groups=dict(before.groups), error=before.error)
    quantised = quantise(
        graph, psnr=PSNR if psnr is None else psnr, data=data, on_progress=on_progress
    )
    return Lowered(
        model=quantised.model,
        changed=True,
        groups=dict(quantised.groups),
        error=quantised.error,
    )


def prepare_graph(
    graph: Path, settings: BuildSettings, output: Path, *, lowered: Lowered | None = None
) -> Prepared:
    """Writes the graph that a plan is built from.

    Args:
        graph: The `.onnx` file that `export` wrote.
        settings: What the plan is built with.
        output: Where to write it. Where there is nothing to change, the file is the graph itself.
        lowered: From `lower_precision`, which is called when None.

    Raises:
        ExportError: As from `lower_precision`.
    """
    lowered = lowered or lower_precision(graph, settings.precision, budget=settings.budget)
    largest = max(profile.most for profile in settings.profiles)
    small = split_queries(lowered.model, batch=largest, limit_bytes=ATTENTION_BYTES)
    # TensorRT-RTX fuses attention in half precision, which then never holds its matrix. Elsewhere
    # that is not certain, and in float32 it is certain not to.
    fuses = settings.flavour == "tensorrt_rtx" and settings.precision != "fp32"
    split = not fuses and any(attention.chunks > 1 for attention in small.attentions)
    model = small.model if split else lowered.model
    if settings.fuse_step:
        model = fuse_step(model)
    prepared = Prepared(
        path=graph,
        groups=lowered.groups,
        error=lowered.error,
        memory=estimate_memory(small.model, batch=largest).total,
    )
    if not (lowered.changed or split or model is not lowered.model):
        return prepared
    write_graph(model, output)
    return replace(prepared, path=output)


def _refuse_lower(graph: Path, model: onnx.ModelProto) -> None:
    try:
        mixed = recorded(model)
    except ExportError:  # types that were chosen elsewhere, which --fp32 keeps
        return
    if mixed is not None:
        raise ExportError(
            f"{graph} is in {mixed.precision} already; float32 cannot be made of it.",
            hint=f"Type --{mixed.precision}, or start from the graph that export wrote.",
        )
