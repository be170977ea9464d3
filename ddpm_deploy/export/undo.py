"""A difference undone: the reference's weights or nodes in the place of the engine's."""

from __future__ import annotations

from collections.abc import Collection

import onnx

from ddpm_deploy.export.graph import producers


def undone(
    reference: onnx.ModelProto, engine: onnx.ModelProto, names: Collection[str]
) -> onnx.ModelProto | None:
    """Returns the engine's graph with some weights and nodes as the reference has them.

    Args:
        reference: The graph that is right.
        engine: The graph in question; left as it is.
        names: Of weights, and of the first outputs of nodes.

    Returns:
        A copy; None where a name is not in both graphs, or a node reads what the engine has not.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(engine)
    graph = copy.graph
    wanted_weights = {tensor.name: tensor for tensor in reference.graph.initializer}
    wanted_nodes = producers(reference.graph)
    weights = {tensor.name: tensor for tensor in graph.initializer}
    nodes = producers(graph)
    there = {value.name for value in graph.input} | weights.keys() | nodes.keys() | {""}
    for name in names:
        if name in weights and name in wanted_weights:
            weights[name].CopyFrom(wanted_weights[name])
        elif name in nodes and name in wanted_nodes:
            node = wanted_nodes[name]
            if not there.issuperset(node.input):
                return None
            nodes[name].CopyFrom(node)
        else:
            return None
    return copy if names else None
