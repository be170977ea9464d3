"""Where in the network a node of its graph is, in the words of the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator

import onnx

from ddpm_deploy.export.graph import constants, consumers, is_op, producers, reads

_ENDINGS = (".weight", ".bias", "_weight", "_bias")


def module_of(parameter: str) -> str | None:
    """Returns the module that a parameter belongs to; None for a number without a name.

    `down1.emb_layer.1` of `down1.emb_layer.1.bias`, `sa1.mha.in_proj` of `sa1.mha.in_proj_bias`.
    The exporter calls what it computed or transposed itself `val_` and a number.
    """
    name = parameter.removesuffix(".half")
    ending = next((ending for ending in _ENDINGS if name.endswith(ending)), None)
    return None if ending is None or name.startswith("val_") else name.removesuffix(ending)


def places(graph: onnx.GraphProto) -> dict[str, str]:
    """Returns, by the name of a node's first output, where the node is.

    A module, where the node reads one's weight, or where its product is what a module's bias is
    added to; `after` the nearest module before it, where it reads none; else the output's name.
    """
    weights = constants(graph).keys()
    readers = consumers(graph)
    makers = producers(graph)
    found: dict[str, str] = {}

    def modules(node: onnx.NodeProto) -> Iterator[str]:
        yield from (m for name in node.input if name in weights and (m := module_of(name)))

    for node in graph.node:
        following = readers.get(node.output[0], [])
        near = [node, *(n for n in following[:1] if is_op(node, "MatMul") and is_op(n, "Add"))]
        own = next((module for n in near for module in modules(n)), None)
        before = (makers[name] for name in reads(node) if name in makers)
        places_before = (found[maker.output[0]] for maker in before if maker.output[0] in found)
        after = next((p for p in places_before if p.startswith("after ") or "." in p), None)
        if own is not None:
            found[node.output[0]] = own
        elif after is not None:
            found[node.output[0]] = f"after {after.removeprefix('after ')}"
        else:
            found[node.output[0]] = node.output[0]
    return found
