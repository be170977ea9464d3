"""The graph that TensorRT reads, made of the graph that `export` wrote: one pass after another."""

from __future__ import annotations

from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from ddpm_deploy.engines.build_settings import BuildSettings
from ddpm_deploy.engines.trt_build import Prepared
from ddpm_deploy.errors import EngineError, ExportError, SpecError
from ddpm_deploy.export.fuse_step import fuse_step
from ddpm_deploy.export.precision import convert, recorded
from ddpm_deploy.files import whole_file
from ddpm_deploy.fused import METADATA_KEY as FUSED_KEY
from ddpm_deploy.fused import is_fused
from ddpm_deploy.spec import METADATA_KEY, ModelSpec


def read_graph(graph: Path) -> tuple[ModelSpec, bool]:
    """Reads what a graph says it is, not its weights.

    Returns:
        The network's spec, and whether the sampler's step stands behind it.

    Raises:
        EngineError: It is missing, or no ONNX file.
        SpecError: It carries no spec that this release reads.
    """
    said = _metadata(_load(graph, weights=False))
    if METADATA_KEY not in said:
        raise SpecError(
            f"{graph} carries no ddpm-deploy spec, so its schedule and its inputs are unknown.",
            hint=f"Export it from its checkpoint: ddpm-deploy export CHECKPOINT -o {graph.name}",
        )
    spec = ModelSpec.from_json(said[METADATA_KEY], source=str(graph))
    return spec, is_fused(said.get(FUSED_KEY), source=str(graph))


def prepare_graph(graph: Path, settings: BuildSettings, output: Path) -> Prepared:
    """Writes the graph that a plan is built from.

    Args:
        graph: The `.onnx` file that `export` wrote.
        settings: What the plan is built with.
        output: Where to write it. Where there is nothing to change, the file is the graph itself.

    Raises:
        ExportError: The graph is in another precision already, or its step is fused and it is in
            none.
    """
    original = model = _load(graph, weights=True)
    groups = {}
    if settings.precision == "fp32":
        _refuse_lower(graph, model)
    else:
        if recorded(model) is None and FUSED_KEY in _metadata(model):
            raise ExportError(
                f"{graph} is in float32 with its step fused, and the step stays in float32.",
                hint=f"Start from the graph that export wrote: --{settings.precision} --fuse-step",
            )
        mixed = convert(model, settings.precision)
        model, groups = mixed.model, dict(mixed.groups)
    if settings.fuse_step:
        model = fuse_step(model)
    if model is original:
        return Prepared(path=graph, groups=groups)
    with whole_file(output) as partial:
        onnx.save_model(model, partial, save_as_external_data=model.ByteSize() >= 2**31)
    return Prepared(path=output, groups=groups)


def _metadata(model: onnx.ModelProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in model.metadata_props}


def _load(graph: Path, *, weights: bool) -> onnx.ModelProto:
    if not graph.is_file():
        raise EngineError(
            f"There is no file {graph}.",
            hint="Make it first: ddpm-deploy export CHECKPOINT -o unet.onnx",
        )
    try:
        return onnx.load_model(graph, load_external_data=weights)
    except (DecodeError, onnx.checker.ValidationError, OSError) as error:
        raise EngineError(
            f"onnx cannot load {graph}: {error}",
            hint="Export the network again: ddpm-deploy export CHECKPOINT",
        ) from error


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
