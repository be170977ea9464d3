"""A graph as its reference knows it: without what the passes and runtimes add to the same function.

Casts, the fused step, and attention cut into parts are looked through, so that what is left can be
compared node by node, by the names of tensors.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.defs import ONNX_DOMAIN

from ddpm_deploy.arrays import Array
from ddpm_deploy.export.graph import constants, is_op, producers, reads
from ddpm_deploy.export.places import places

_PART = re.compile(r"(?P<whole>.+)\.\d+(?:\.(?P<name>.+))?")
_STANDARD = ("", ONNX_DOMAIN)
_HALF = (TensorProto.FLOAT16, TensorProto.BFLOAT16)

LOWERED = (".one", ".row", ".shift", ".whole")
"""Ends the names of nodes that stand for several, from a pass; what they give keeps its name."""

_SAME_AS = {
    # What ONNX Runtime fuses, by the operator that gave its output its name.
    "com.microsoft.BiasGelu": "Gelu",
    "com.microsoft.FastGelu": "Gelu",
    "com.microsoft.FusedConv": "Conv",
    "com.microsoft.FusedGemm": "Gemm",
    "com.microsoft.FusedMatMul": "MatMul",
    "com.microsoft.Gelu": "Gelu",
    "com.microsoft.SkipLayerNormalization": "LayerNormalization",
}


@dataclass(frozen=True, kw_only=True)
class PlainNode:
    """A node under the names that the exported graph has.

    Attributes:
        node: As it stands in the graph.
        inputs: What it reads, casts looked through.
        outputs: What it makes.
        where: See `places`.
    """

    node: onnx.NodeProto
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    where: str

    @property
    def op_type(self) -> str:
        """Such as `Conv`; with its domain where it is not ONNX's."""
        node = self.node
        return node.op_type if node.domain in _STANDARD else f"{node.domain}.{node.op_type}"


class Plain:
    """What a graph computes `out` with.

    Args:
        model: A graph of this package's exporter, in any of its variants.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        graph = model.graph
        self._makers = producers(graph)
        self._halves = half_tensors(graph)
        self.opset = max(o.version for o in model.opset_import if o.domain in _STANDARD)
        self.weights = {self.name(n): tensor for n, tensor in constants(graph).items()}
        where = places(graph)
        needed = self._needed([value.name for value in graph.output])
        self.nodes: dict[str, PlainNode] = {}
        self.fused = False
        self.lowered = any(node.name.endswith(LOWERED) for node in graph.node)
        for node in graph.node:
            name = self.name(node.output[0])
            if node.output[0] not in needed or self._looked_through(node) or name in self.nodes:
                continue
            self.fused |= node.domain not in _STANDARD
            self.nodes[name] = PlainNode(
                node=node,
                inputs=tuple(map(self.name, node.input)),
                outputs=tuple(map(self.name, node.output)),
                where=where[node.output[0]],
            )
        self.read = {name for node in self.nodes.values() for name in node.inputs if name}

    def name(self, tensor: str) -> str:
        """Returns the name that a tensor has in the exported graph."""
        match = _PART.fullmatch(tensor)
        if match and self._is_join(match["whole"]):
            tensor = match["name"] or match["whole"]
        tensor = _bare(tensor)
        maker = self._makers.get(tensor)
        if maker is None or not is_op(maker, "Cast"):
            return tensor
        source = maker.input[0]
        # A float in another width; casts of our own lead back to the name they began with.
        cast = {tensor, source} & self._halves and _bare(source) != tensor
        return self.name(source) if cast else tensor

    def _is_join(self, tensor: str) -> bool:
        maker = self._makers.get(tensor)
        return maker is not None and maker.name == f"{tensor}.join"

    def _looked_through(self, node: onnx.NodeProto) -> bool:
        if is_op(node, "Constant") or node.name.endswith(LOWERED):
            return True
        if is_op(node, "Cast", "Split"):
            return self.name(node.input[0]) == self.name(node.output[0])
        return is_op(node, "Concat") and self._is_join(node.output[0])

    def _needed(self, outputs: list[str]) -> set[str]:
        """Returns the first outputs of the nodes that `out` depends on, before the step."""
        wanted = ["out"] if "out" in outputs else list(outputs)
        needed: set[str] = set()
        while wanted:
            node = self._makers.get(wanted.pop())
            if node is not None and node.output[0] not in needed:
                needed.add(node.output[0])
                wanted += reads(node)
        return needed


def _bare(tensor: str) -> str:
    """Returns a name without what casts of this package add to it."""
    for ending in (".half", ".float", ".rounded", ".exact"):
        tensor = tensor.removesuffix(ending)
    return tensor


def half_tensors(graph: onnx.GraphProto) -> set[str]:
    """Returns the tensors in half precision, by the casts and weights that they come from."""
    halves = {tensor.name for tensor in graph.initializer if tensor.data_type in _HALF}
    for node in graph.node:
        if is_op(node, "Cast"):
            to = next(a.i for a in node.attribute if a.name == "to")
            half = to in _HALF
        else:
            half = any(name in halves for name in node.input)
        if half:
            halves.update(node.output)
    return halves


class Pair:
    """Two plain graphs, and the nodes that both have."""

    def __init__(self, reference: Plain, engine: Plain) -> None:
        self.reference, self.engine = reference, engine
        by_output = {name: node for node in engine.nodes.values() for name in node.outputs}
        nodes = [
            (node, by_output[node.outputs[0]])
            for node in reference.nodes.values()
            if node.outputs[0] in by_output
        ]
        numbered = [family(a) == family(b) for a, b in nodes if _numbered(a.outputs[0])]
        # Another opset numbers the tensors otherwise; then these names mean nothing.
        self.names_hold = sum(numbered) >= 0.8 * len(numbered)
        self.nodes = [(a, b) for a, b in nodes if self.names_hold or not _numbered(a.outputs[0])]
        self._known = reference.nodes.keys() | {
            name for node in reference.nodes.values() for name in (*node.inputs, *node.outputs)
        }
        self._known_to_engine = {
            name for node in engine.nodes.values() for name in (*node.inputs, *node.outputs)
        }

    def knows(self, wanted: Sequence[str], given: Sequence[str]) -> bool:
        """Says whether tensors of the reference are in the engine, and the other way round."""
        return self._known_to_engine.issuperset(wanted) and self._known.issuperset(given)


def _numbered(name: str) -> bool:
    return name.startswith("val_")


def family(node: PlainNode) -> str:
    """Returns the operator of ONNX that a node is, or that ONNX Runtime fused it from."""
    return _SAME_AS.get(node.op_type, node.op_type)


def attributes(node: onnx.NodeProto, opset: int) -> dict[str, object]:
    """Returns a standard operator's attributes, those that are left out with ONNX's defaults."""
    schema = onnx.defs.get_schema(node.op_type, opset, "")
    found = {
        name: helper.get_attribute_value(attribute.default_value)
        for name, attribute in schema.attributes.items()
        if attribute.default_value.name
    }
    found.update((a.name, helper.get_attribute_value(a)) for a in node.attribute)
    return {name: _plain(value) for name, value in found.items()}


def _plain(value: object) -> object:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, list):
        return tuple(value)
    return value


def array_of(tensor: onnx.TensorProto) -> Array:
    """Returns the numbers of a constant."""
    array: Array = numpy_helper.to_array(tensor)
    return array
