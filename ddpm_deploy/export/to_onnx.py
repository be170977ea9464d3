"""From a network in PyTorch to an ONNX file with its spec inside."""

from __future__ import annotations

import inspect
import io
import logging
import secrets
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

from ddpm_deploy.errors import ExportError
from ddpm_deploy.export.check import Deviation, check_graph
from ddpm_deploy.files import flush, whole_file
from ddpm_deploy.model.blame import said
from ddpm_deploy.spec import METADATA_KEY, ModelSpec

OPSETS = range(18, 24)
"""Opsets that can be written; 20 by default, the last whose operators TensorRT 10.3 parses."""

EXTERNAL_DATA_BYTES = 2**31 - 2**25
"""Weights above this go to a file beside the graph: protobuf ends at 2 GiB."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """An ONNX file that is the same function as the network it came from.

    Attributes:
        path: The file.
        spec: What it carries.
        opset: Version of its operators.
        nodes: Operators in the graph.
        parameters: Numbers in its weights.
        bytes: Size of the file, with its external data.
        deviations: What the check measured, a batch size and timestep each.
        seconds: How long export and check took.
    """

    path: Path
    spec: ModelSpec
    opset: int
    nodes: int
    parameters: int
    bytes: int
    deviations: tuple[Deviation, ...]
    seconds: float


def export_network(network: nn.Module, spec: ModelSpec, path: Path, *, opset: int = 20) -> Exported:
    """Writes a network as ONNX: inputs `x`, `t` and the conditions, output `out`.

    The batch axis is dynamic. The file is compared with the network in ONNX Runtime before it gets
    its name; after any failure nothing is left behind, and what stood there before still stands.

    Args:
        network: In evaluation mode, on the CPU, float32; called with (x, t, *conditions).
        spec: What it is.
        path: Where to; overwritten.
        opset: One of `OPSETS`.

    Raises:
        ExportError: The network cannot be exported, or the graph is not the same function.
        ValueError: `opset` is not among `OPSETS`.
        OSError: The folder cannot be written, or is full.
    """
    start = time.perf_counter()
    if opset not in OPSETS:
        raise ValueError(f"opset is {opset}; this exporter writes {OPSETS[0]} to {OPSETS[-1]}")
    data = path.resolve().with_name(f"{path.stem}.{secrets.token_hex(4)}.data")
    try:
        # Opened first: a folder that cannot be made fails before the long work.
        with whole_file(path) as partial:
            model = trace_network(network, spec, opset=opset)
            _strip_provenance(model)
            onnx.helper.set_model_props(model, {METADATA_KEY: spec.to_json()})
            model.producer_name, model.producer_version = "ddpm-deploy", spec.tool_version
            _save(model, partial, data)
            deviations = check_graph(partial, network, spec)
    except BaseException:
        with suppress(OSError):  # there is no folder that it could be in
            data.unlink()
        raise
    return Exported(
        path=path,
        spec=spec,
        opset=opset,
        nodes=len(model.graph.node),
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        bytes=path.stat().st_size + (data.stat().st_size if data.exists() else 0),
        deviations=deviations,
        seconds=time.perf_counter() - start,
    )


def trace_network(network: nn.Module, spec: ModelSpec, *, opset: int = 20) -> onnx.ModelProto:
    """Returns a network as ONNX, unchecked and without its spec; arguments as `export_network`."""
    batch = 2  # an example of 1 would be taken for a constant
    inputs = {
        "x": torch.zeros(batch, *spec.sample_shape),
        "t": torch.zeros(batch, dtype=torch.int64),
        **{
            c.name: torch.zeros(batch, *c.shape, dtype=getattr(torch, c.dtype))
            for c in spec.conditions
        },
    }
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                network,
                tuple(inputs.values()),
                dynamo=True,
                opset_version=opset,
                input_names=list(inputs),
                output_names=["out"],
                dynamic_shapes=_free_batch(network, len(inputs)),
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ExportError(
            f"torch.onnx could not export this network: {said(error)}",
            hint="What it computes may depend on shapes, and not on the numbers in x and t; its "
            "batch must be free. Networks of the documented families export.",
        ) from error
    if program is None:
        raise ExportError("torch.onnx gave no graph.")
    model = program.model_proto
    if len(model.graph.output) != 1:
        raise ExportError(f"The network gives {len(model.graph.output)} outputs; it must give one.")
    return model


def _free_batch(network: nn.Module, inputs: int) -> tuple[Any, ...]:
    """Returns that every input's first axis is the batch, in the form of the network's arguments.

    What a network takes as `*conditions` is one argument for torch.export.
    """
    batch = {0: "batch"}
    kinds = [parameter.kind for parameter in inspect.signature(network.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        return (batch,) * inputs
    named = kinds.index(inspect.Parameter.VAR_POSITIONAL)
    return (*(batch,) * named, (batch,) * (inputs - named))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps torch's remarks about its own insides from the user."""
    names = ("torch.onnx", "torch.__trace", "torch.fx", "torch.fx.experimental.symbolic_shapes")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):  # graphs of what failed
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _strip_provenance(model: onnx.ModelProto) -> None:
    """Removes the stack traces, with this machine's paths, that torch leaves at every node."""
    graph = model.graph
    for items in (graph.node, graph.input, graph.output, graph.initializer, graph.value_info):
        for item in items:
            del item.metadata_props[:]
            item.doc_string = ""
    del graph.metadata_props[:]
    graph.name = "ddpm"


def _save(model: onnx.ModelProto, partial: Path, data: Path) -> None:
    weights = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    if weights <= EXTERNAL_DATA_BYTES:
        onnx.save_model(model, partial)
    else:
        onnx.save_model(
            model, partial, save_as_external_data=True, location=data.name, size_threshold=1024
        )
        flush(data)
    onnx.checker.check_model(partial, full_check=True)
