"""An exported graph written with the operators that one runtime runs fastest: passes in a row.

The exported graph stays the artefact of record; what comes out here is for one runtime.
"""

from __future__ import annotations

from pathlib import Path

import onnx

from ddpm_deploy.errors import ExportError
from ddpm_deploy.export.fuse_step import fuse_step
from ddpm_deploy.export.one_attention import merge_attention
from ddpm_deploy.export.onnx_file import load_graph, metadata, save_graph
from ddpm_deploy.export.time_table import tabulate_time
from ddpm_deploy.export.whole_norm import merge_single_groups
from ddpm_deploy.runtime import METADATA_KEY, Runtime, RuntimeRecord
from ddpm_deploy.spec import ModelSpec


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


def lower_file(graph: Path, output: Path, record: RuntimeRecord, *, fuse: bool = False) -> None:
    """Writes the engine that a runtime opens, from an exported graph.

    Args:
        graph: The file that `export` wrote, or one with Q/DQ pairs.
        output: Where to write.
        record: What the engine says of itself.
        fuse: Whether the sampler's step is put behind the network.

    Raises:
        EngineError: The file is no ONNX.
        ExportError: It is an engine already, or as in `lower` and `fuse_step`.
        SpecError: As in `lower`.
    """
    model = load_graph(graph)
    if METADATA_KEY in metadata(model):
        raise ExportError(
            f"{graph} is an engine already, built for one runtime.",
            hint="Build from the graph that export wrote: ddpm-deploy build unet.onnx",
        )
    lowered = onnx.ModelProto()
    lowered.CopyFrom(lower(fuse_step(model) if fuse else model, record.runtime))
    lowered.metadata_props.add(key=METADATA_KEY, value=record.to_json())
    save_graph(lowered, output)
