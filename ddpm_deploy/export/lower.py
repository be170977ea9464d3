"""An exported graph written with the operators that one runtime runs fastest: passes in a row.

The exported graph stays the artefact of record; what comes out here is for one runtime.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnx
from onnx import helper

from ddpm_deploy.errors import ExportError
from ddpm_deploy.export.fuse_step import fuse_step
from ddpm_deploy.export.one_attention import merge_attention
from ddpm_deploy.export.onnx_file import load_graph, metadata, save_graph
from ddpm_deploy.export.qdq import shift_output
from ddpm_deploy.export.time_table import tabulate_time
from ddpm_deploy.export.whole_norm import merge_single_groups
from ddpm_deploy.runtime import METADATA_KEY, Runtime, RuntimeRecord, read_runtime
from ddpm_deploy.spec import ModelSpec

Graph: TypeAlias = onnx.ModelProto


def lower(model: onnx.ModelProto, runtime: Runtime) -> onnx.ModelProto:
    """Writes a graph for a runtime on the CPU.

    - ONNX Runtime: every attention is one operator. Group normalisation and the timestep's
      embedding stay as they are: another form was not faster.
    - OpenVINO: a normalisation over the whole sample is one operator, and the timestep's embedding
      a table. Attention it finds by itself.

    Args:
        model: As `export` wrote it, in float32 or with Q/DQ pairs; not changed.
        runtime: What will run it.

    Returns:
        The same function; the given graph where no pass finds anything.

    Raises:
        ExportError: A table does not give what the graph gives.
        SpecError: It carries no spec that this release reads.
    """
    if runtime == "onnxruntime":
        return merge_attention(model)
    spec = ModelSpec.from_metadata(metadata(model), source="This graph")
    return merge_single_groups(tabulate_time(model, spec.schedule.T).model)


def lower_graph(graph: Path, runtime: Runtime, *, fuse: bool = False) -> onnx.ModelProto:
    """Reads an exported graph and writes it for a runtime.

    Args:
        graph: The file that `export` wrote, or one with Q/DQ pairs.
        runtime: As in `lower`.
        fuse: Whether the sampler's step is put behind the network.

    Raises:
        EngineError: The file is no ONNX.
        ExportError: It is another runtime's engine, or as in `lower` and `fuse_step`.
        SpecError: As in `lower`.
    """
    model = load_graph(graph)
    before = read_runtime(metadata(model).get(METADATA_KEY), source=str(graph))
    if before is not None and before.runtime != runtime:
        raise ExportError(
            f"{graph} is an engine already, for {before.runtime}.",
            hint="Build from the graph that export wrote: ddpm-deploy build unet.onnx",
        )
    return lower(fuse_step(model) if fuse else model, runtime)


def write_engine(model: onnx.ModelProto, record: RuntimeRecord, output: Path) -> None:
    """Writes a lowered graph with what it says of itself, and its output's mean put right."""
    if record.shift:
        engine = shift_output(model, np.array(record.shift, np.float32))
    else:
        engine = onnx.ModelProto()
        engine.CopyFrom(model)
    said = {**metadata(model), METADATA_KEY: record.to_json()}
    helper.set_model_props(engine, said)
    save_graph(engine, output)
