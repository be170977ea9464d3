"""ONNX files, read and written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from ddpm_deploy.errors import EngineError
from ddpm_deploy.files import whole_file

_ONE_FILE = 2**31 - 2**25
"""Bytes that fit into one file: protobuf ends at 2 GiB."""


def load_graph(path: Path, *, weights: bool = True) -> onnx.ModelProto:
    """Reads an ONNX file.

    Args:
        path: The file.
        weights: Whether to read those that lie in other files.

    Raises:
        EngineError: It is missing, or no ONNX file, or its weights are missing.
    """
    if not path.is_file():
        raise EngineError(
            f"There is no file {path}.",
            hint="Make it first: ddpm-deploy export CHECKPOINT -o unet.onnx",
        )
    try:
        model = onnx.load_model(path, load_external_data=weights)
    except (DecodeError, onnx.checker.ValidationError, OSError, ValueError) as error:
        raise _no_graph(path, str(error)) from error
    if not model.graph.output:  # an empty file is a model to protobuf
        raise _no_graph(path, "it holds no graph")
    if not all(isinstance(text, str) for text in _texts(model)):
        raise _no_graph(path, "its names are no UTF-8")
    return model


def external_files(model: onnx.ModelProto) -> tuple[str, ...]:
    """Returns the names of the files that hold weights besides the model's own."""
    return tuple(
        dict.fromkeys(
            entry.value
            for tensor in model.graph.initializer
            for entry in tensor.external_data
            if entry.key == "location"
        )
    )


def weight_files(graph: Path) -> list[Path]:
    """Returns the files that hold a graph's weights besides its own.

    Raises:
        EngineError: As from `load_graph`, or one of them is missing.
    """
    files = [graph.parent / name for name in external_files(load_graph(graph, weights=False))]
    if missing := [file for file in files if not file.is_file()]:
        raise EngineError(
            f"{graph} has weights in {missing[0]}, which is no file.",
            hint="Copy it beside the graph, or export the network again: "
            "ddpm-deploy export CHECKPOINT",
        )
    return files


def save_graph(model: onnx.ModelProto, path: Path) -> None:
    """Writes an ONNX file; above 2 GiB its weights stand beside it."""
    onnx.save_model(model, path, save_as_external_data=model.ByteSize() >= _ONE_FILE)


def write_graph(model: onnx.ModelProto, path: Path) -> None:
    """Writes an ONNX file as `save_graph` does, whole or not at all."""
    with whole_file(path) as partial:
        save_graph(model, partial)


def metadata(model: onnx.ModelProto) -> dict[str, str]:
    """Returns a graph's `metadata_props`."""
    return {entry.key: entry.value for entry in model.metadata_props}


def _texts(model: onnx.ModelProto) -> Iterator[object]:
    """Yields the names in a model; protobuf gives bytes where one is no UTF-8."""
    graph = model.graph
    yield from (model.producer_name, model.producer_version, graph.name)
    for entry in model.metadata_props:
        yield from (entry.key, entry.value)
    for node in graph.node:
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
    for tensor in graph.initializer:
        yield tensor.name
        yield from (entry.value for entry in tensor.external_data)
    for value in (*graph.input, *graph.output, *graph.value_info):
        yield value.name
        yield from (dim.dim_param for dim in value.type.tensor_type.shape.dim)


def _no_graph(path: Path, why: str) -> EngineError:
    return EngineError(
        f"{path} is no ONNX file: {why}.",
        hint="Export the network again: ddpm-deploy export CHECKPOINT",
    )
