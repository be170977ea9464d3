"""What a graph computes inside: the values of any of its tensors, in ONNX Runtime.

Parts of the graph are run as they are written, with nothing fused. A graph in half precision is to
be `rounded` before: ONNX Runtime's CPU provider does not compute in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx
from onnx import helper

from ddpm_deploy.arrays import Array
from ddpm_deploy.engines.base import needs
from ddpm_deploy.export.calibrate import written
from ddpm_deploy.export.graph import producers, reads, tensor_types
from ddpm_deploy.fused import COLUMNS

GROUP_BYTES = 2**28
"""What the tensors that are looked at together may take: 256 MiB, or one that is larger."""

_GIVEN = ".given"
_SHAPE = ".shape"


def values(
    model: onnx.ModelProto,
    feeds: Mapping[str, Array],
    names: Sequence[str],
    *,
    given: Mapping[str, Array] | None = None,
    threads: int | None = None,
) -> dict[str, Array]:
    """Returns tensors of a graph by name.

    Args:
        model: The graph; what the tensors do not depend on is not run.
        feeds: The graph's inputs by name. Others are ignored.
        names: Tensors that nodes make.
        given: Values that the nodes shall read in place of those that the graph would compute. A
            tensor that is given and asked for is computed, but nobody reads it.
        threads: CPU threads; one a core when None.

    Raises:
        EngineError: ONNX Runtime cannot run it.
        MissingDependencyError: ONNX Runtime is not installed.
    """
    if not names:
        return {}
    given = given or {}
    small = _part(model, names, given)
    inputs = {value.name for value in small.graph.input}
    fed = {**feeds, **{name + _GIVEN: value for name, value in given.items()}}
    with needs("onnxruntime", extra="cpu"):
        from ddpm_deploy.engines.ort import run_graph  # noqa: PLC0415
    with written(small) as path:
        (outputs,) = run_graph(
            path,
            [{name: value for name, value in fed.items() if name in inputs}],
            names,
            threads=threads,
            as_written=True,
        )
    return dict(zip(names, outputs, strict=True))


def shapes(
    model: onnx.ModelProto,
    feeds: Mapping[str, Array],
    names: Sequence[str],
    *,
    threads: int | None = None,
) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of tensors for these inputs; arguments as in `values`.

    ONNX infers them. Behind what it does not know, as ONNX Runtime's own operators, they are run.
    """
    types = tensor_types(model, batch=len(feeds["x"]))
    found = {n: shape for n in names if (shape := types[n].shape if n in types else None)}
    unknown = [name for name in names if name not in found]
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.graph.node.extend(helper.make_node("Shape", [name], [name + _SHAPE]) for name in unknown)
    run = values(copy, feeds, [name + _SHAPE for name in unknown], threads=threads)
    return {**found, **{name: tuple(map(int, run[name + _SHAPE])) for name in unknown}}


def groups(names: Sequence[str], sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Yields names in their order, as many at a time as `GROUP_BYTES` allow, and at least one."""
    group: list[str] = []
    for name in names:
        if group and sum(sizes[n] for n in (*group, name)) > GROUP_BYTES:
            yield group
            group = []
        group.append(name)
    if group:
        yield group


def one_at_a_time(
    model: onnx.ModelProto, feeds: Mapping[str, Array]
) -> Iterator[tuple[int, dict[str, Array]]]:
    """Yields the number of an image, and the inputs for it alone: so less memory is needed.

    A graph of one batch alone gets all of them at once. What a fused step takes besides is 0.
    """
    x = feeds["x"]
    fixed = any(
        value.name == "x" and value.type.tensor_type.shape.dim[0].HasField("dim_value")
        for value in model.graph.input
    )
    step = len(x) if fixed else 1
    for i in range(0, len(x), step):
        one = {name: value[i : i + step] for name, value in feeds.items()}
        yield i, {"row": np.zeros(len(COLUMNS), np.float32), "z": np.zeros_like(one["x"]), **one}


def _part(
    model: onnx.ModelProto, names: Sequence[str], given: Mapping[str, Array]
) -> onnx.ModelProto:
    """Returns the part of a graph that makes some tensors, out of those given and its inputs."""
    graph = model.graph
    makers = producers(graph)
    needed: set[str] = set()
    wanted = list(names)
    while wanted:
        node = makers.get(wanted.pop())
        if node is not None and node.output[0] not in needed:
            needed.add(node.output[0])
            # What a subgraph reads keeps its name, so it is computed.
            wanted += [n for n in reads(node) if n not in given or n not in node.input]
    part = onnx.ModelProto(ir_version=model.ir_version)
    part.opset_import.extend(model.opset_import)
    part.functions.extend(model.functions)
    part.graph.name = graph.name
    for node in graph.node:
        if node.output[0] in needed:
            copy = part.graph.node.add()
            copy.CopyFrom(node)
            for i, name in enumerate(node.input):
                if name in given:
                    copy.input[i] = name + _GIVEN
    read = {name for node in part.graph.node for name in reads(node)}
    part.graph.input.extend(value for value in graph.input if value.name in read)
    part.graph.input.extend(
        helper.make_tensor_value_info(
            name + _GIVEN, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape
        )
        for name, value in given.items()
        if name + _GIVEN in read
    )
    part.graph.initializer.extend(t for t in graph.initializer if t.name in read)
    part.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return part
