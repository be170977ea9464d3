"""How two graphs of one network differ, read off the files: nothing is run.

What the passes of this package and ONNX Runtime do to a graph is looked through (`plain`); what is
left is compared node by node, by the names of tensors, and weight by weight.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from ddpm_deploy.arrays import Array
from ddpm_deploy.export.compare_weights import (
    FLOATS,
    bias_missing,
    checkpoint_pairs,
    missing_biases,
    paired_weights,
    weight_faults,
)
from ddpm_deploy.export.difference import Difference, listed, times, worst
from ddpm_deploy.export.places import module_of
from ddpm_deploy.export.plain import Pair, Plain, PlainNode, array_of, attributes, family
from ddpm_deploy.export.precision import MOVES, POINTWISE
from ddpm_deploy.export.weights import change

_COUNTED = {
    **dict.fromkeys(("Conv", "ConvTranspose"), "convolutions"),
    **dict.fromkeys(("MatMul", "Gemm"), "matrix products"),
    **dict.fromkeys(
        ("InstanceNormalization", "GroupNormalization", "LayerNormalization", "BatchNormalization"),
        "normalisations",
    ),
    **dict.fromkeys(("MaxPool", "AveragePool"), "poolings"),
    "Resize": "resizings",
    "Softmax": "softmaxes",
}

_WITHOUT_MEANING = {"stash_type", "saturate", "storage_order", "allowzero", "approximate"}
"""Attributes that do not change these networks' numbers, and GELU's, which is seen to apart."""


def differences(reference: onnx.ModelProto, engine: onnx.ModelProto) -> list[Difference]:
    """Returns how an engine's graph differs from the reference's: at most ten things, worst first.

    Nothing is said of a fused step, of attention cut into parts, of casts, and of what ONNX Runtime
    fuses; rounded weights are `weights-rounded`. Tensors and weights are matched by name, and
    weights without one by the node that reads them, so both should come from the same exporter.

    Args:
        reference: The graph that is right.
        engine: The graph in question.
    """
    pair = Pair(Plain(reference), Plain(engine))
    found = [*_structure(pair), *_operators(pair), *_attributes(pair), *_wiring(pair)]
    return worst([*found, *weight_faults(paired_weights(pair)), *missing_biases(pair)])


def weight_differences(reference: Mapping[str, Array], engine: onnx.ModelProto) -> list[Difference]:
    """Returns how a graph's weights differ from a checkpoint's: at most ten things, worst first.

    The exporter keeps the state dict's name for what a graph reads as it is: the weights and biases
    of convolutions, embeddings, biases and layer norms. The weights of linear layers before a
    `MatMul` are transposed, group norms' reshaped to (C, 1, 1), and both are called `val_` and a
    number. The former are found by the bias that is added behind them, the latter by their numbers,
    and what is left over by its order.

    Args:
        reference: Name to array, as in a state dict.
        engine: The graph in question.
    """
    plain = Plain(engine)
    pairs = list(checkpoint_pairs(reference, plain))
    missing = [
        bias_missing(name)
        for name in reference
        if name.endswith("bias")
        and np.any(reference[name])
        and name not in {label for label, _, _ in pairs}
        and f"{module_of(name)}.weight" in plain.read
    ]
    return worst([*weight_faults(pairs), *missing])


def _structure(pair: Pair) -> Iterator[Difference]:
    counts = [
        Counter(_COUNTED[f] for n in plain.nodes.values() if (f := family(n)) in _COUNTED)
        for plain in (pair.reference, pair.engine)
    ]
    if any(n.op_type.endswith("Attention") for n in pair.engine.nodes.values()):
        return  # one node for several
    wanted, given = counts
    differing = [name for name in wanted | given if wanted[name] != given[name]]
    if pair.engine.lowered:  # which leaves convolutions as they are
        differing = [name for name in differing if name == "convolutions"]
    if not differing:
        return
    names = [p.nodes.keys() for p in (pair.reference, pair.engine)]
    gone = [pair.reference.nodes[n] for n in names[0] if n not in names[1]]
    gone = [node for node in gone if family(node) in _COUNTED]
    yield Difference(
        kind="structure",
        where=listed([node.where for node in gone]) or "the graph",
        says="The engine has "
        + ", ".join(f"{given[n]} {n}, the reference {wanted[n]}" for n in differing)
        + ".",
        evidence={"reference": dict(wanted), "engine": dict(given)},
    )


def _operators(pair: Pair) -> Iterator[Difference]:
    """Yields operators in the place of others; the two forms of GELU also where written out."""
    forms: list[tuple[PlainNode, str, str]] = []
    for a, b in pair.nodes:
        wanted, given = _gelu(a, pair.reference), _gelu(b, pair.engine)
        if wanted and given:
            if wanted != given:
                forms.append((a, wanted, given))
        elif family(a) != family(b) and not {family(a), family(b)} - _COMPUTING:
            yield Difference(
                kind="operator-replaced",
                where=a.where,
                says=f"{a.outputs[0]} is made by {b.op_type}; in the reference by {a.op_type}.",
                evidence={"reference": a.op_type, "engine": b.op_type},
                names=(a.outputs[0],),
            )
    if forms:
        _, wanted, given = forms[0]
        yield Difference(
            kind="gelu",
            where=listed([node.where for node, _, _ in forms]),
            says=f"GELU is computed by {given} at {times(len(forms))}; the reference computes it "
            f"by {wanted}.",
            evidence={"reference": wanted, "engine": given, "nodes": len(forms)},
            names=tuple(node.outputs[0] for node, _, _ in forms),
        )


_COMPUTING = {*_COUNTED, *POINTWISE, "Exp", "Log", "Pow", "Sqrt", "Sin", "Cos"}


def _gelu(node: PlainNode, plain: Plain) -> str | None:
    """Returns how GELU is computed that ends in this node; None where none does."""
    if node.op_type == "com.microsoft.FastGelu":
        return "tanh"
    if family(node) == "Gelu":
        named = {a.name: a.s.decode() for a in node.node.attribute}
        return "tanh" if named.get("approximate") == "tanh" else "erf"
    if node.op_type != "Mul":
        return None
    wanted = [node]
    for _ in range(12):
        if not wanted:
            break
        found = wanted.pop(0)
        if found.op_type in {"Erf", "Tanh"}:
            return found.op_type.lower()
        if found.op_type in {"Mul", "Add", "Div"}:
            wanted += [plain.nodes[name] for name in found.inputs if name in plain.nodes]
    return None


def _attributes(pair: Pair) -> Iterator[Difference]:
    """Yields attributes and small constants with other values, the same change once."""
    changed: dict[tuple[str, str, str, str], list[PlainNode]] = {}
    for a, b in pair.nodes:
        if a.op_type != b.op_type or "." in a.op_type:
            continue
        wanted = attributes(a.node, pair.reference.opset)
        given = attributes(b.node, pair.engine.opset)
        for name in sorted((wanted.keys() | given.keys()) - _WITHOUT_MEANING):
            if a.op_type == "Cast" or _equal(wanted.get(name), given.get(name)):
                continue
            values = _shown(wanted.get(name)), _shown(given.get(name))
            changed.setdefault((a.op_type, name, *values), []).append(a)
        for one, other in _constants(a, b, pair):
            made = change(one, other)
            if made is not None and made.kind != "weights-rounded":
                key = (a.op_type, "constant", _shown(one.tolist()), _shown(other.tolist()))
                changed.setdefault(key, []).append(a)
    for (op_type, name, wanted_value, given_value), nodes in changed.items():
        yield Difference(
            kind="resize"
            if op_type == "Resize"
            else name
            if name in {"epsilon", "constant"}
            else "attribute",
            where=listed([node.where for node in nodes]),
            says=f"{name} of {op_type} is {given_value} at {times(len(nodes))}; in the reference "
            f"it is {wanted_value}.",
            evidence={
                "operator": op_type,
                "attribute": name,
                "reference": wanted_value,
                "engine": given_value,
                "nodes": len(nodes),
            },
            names=tuple(node.outputs[0] for node in nodes),
        )


def _constants(a: PlainNode, b: PlainNode, pair: Pair) -> Iterator[tuple[Array, Array]]:
    """Yields the single numbers and the integers that two nodes read, side by side."""
    for one, other in zip(a.inputs, b.inputs, strict=False):
        wanted, given = pair.reference.weights.get(one), pair.engine.weights.get(other)
        if wanted is None or given is None or module_of(one):
            continue
        if math.prod(wanted.dims) == 1 or wanted.data_type not in FLOATS or a.op_type == "Resize":
            yield array_of(wanted), array_of(given)


def _wiring(pair: Pair) -> Iterator[Difference]:
    """Yields nodes that read other tensors than in the reference."""
    if not pair.names_hold:
        return
    sides = list(_attentions(pair.reference))
    swapped: dict[str, list[str]] = {}
    for a, b in pair.nodes:
        wanted, given = _activations(a, pair), _activations(b, pair)
        same = wanted == given and a.outputs == b.outputs
        if same or family(a) != family(b):  # what was replaced is said by `_operators`
            continue
        if pair.engine.fused and not pair.knows(wanted, given) and not _bypasses(a, b, pair):
            continue  # read from what ONNX Runtime made of several nodes
        at = next((side for side in sides if side.exchanged(a, b, wanted, given)), None)
        if at is not None:
            swapped.setdefault(at.where, []).append(a.outputs[0])
        elif wanted != given:
            names = ", ".join(given), ", ".join(wanted)
            yield Difference(
                kind="wiring",
                where=a.where,
                says=f"{a.op_type} {a.outputs[0]} reads {names[0]}; in the reference it reads "
                f"{names[1]}.",
                evidence={"reference": names[1], "engine": names[0]},
                names=(a.outputs[0],),
            )
    yield from (_swapped(where, names) for where, names in swapped.items())


def _bypasses(a: PlainNode, b: PlainNode, pair: Pair) -> bool:
    """Says whether a node that computes reads a tensor of the reference in place of another."""
    if a.op_type != b.op_type or a.op_type not in _COMPUTING or len(a.inputs) != len(b.inputs):
        return False
    changed = [(x, y) for x, y in zip(a.inputs, b.inputs, strict=True) if x != y]
    return all(
        y in pair.reference.nodes and y not in _moved_from(x, pair.reference) for x, y in changed
    )


def _swapped(where: str, names: Sequence[str]) -> Difference:
    return Difference(
        kind="q-k-swapped",
        where=where,
        says=f"Queries and keys are exchanged in the attention of {where}: its scores are the "
        "reference's, transposed.",
        names=tuple(names),
    )


def _activations(node: PlainNode, pair: Pair) -> list[str]:
    """Returns what a node reads, weights aside; in the order of the names where it is no matter."""
    weights = pair.reference.weights.keys() | pair.engine.weights.keys()
    read = [name for name in node.inputs if name and name not in weights]
    return sorted(read) if node.op_type in {"Add", "Mul"} else read


@dataclass(frozen=True)
class _Attention:
    """The tensors on both sides of a product of queries and keys, back to where they part."""

    where: str
    scores: str
    queries: frozenset[str]
    keys: frozenset[str]

    def exchanged(
        self, a: PlainNode, b: PlainNode, wanted: Sequence[str], given: Sequence[str]
    ) -> bool:
        """Says whether a node takes one side for the other."""
        if a.outputs[0] == self.scores:
            return list(wanted) == list(reversed(given))
        if a.outputs != b.outputs:
            moved = {x for x, y in zip(a.outputs, b.outputs, strict=False) if x != y}
        else:
            moved = {x for x, y in zip(wanted, given, strict=False) if x != y}
            moved |= {y for x, y in zip(wanted, given, strict=False) if x != y}
        return bool(moved & self.queries) and bool(moved & self.keys)


def _attentions(plain: Plain) -> Iterator[_Attention]:
    for node in plain.nodes.values():
        if family(node) != "Softmax":
            continue
        scores = plain.nodes.get(node.inputs[0])
        while scores is not None and scores.op_type in {"Mul", "Div", "Add"}:
            scores = plain.nodes.get(scores.inputs[0])
        if scores is not None and family(scores) == "MatMul":
            queries, keys = (frozenset(_moved_from(name, plain)) for name in scores.inputs[:2])
            where = scores.where.removeprefix("after ")
            yield _Attention(where, scores.outputs[0], queries, keys)


def _moved_from(name: str, plain: Plain) -> Iterator[str]:
    """Yields a tensor and those before it that hold the same numbers, or multiples."""
    yield name
    node = plain.nodes.get(name)
    if node is not None and node.op_type in {*MOVES, "Mul", "Div"} - {"Split"}:
        yield from _moved_from(node.inputs[0], plain)


def _equal(one: object, other: object) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6)
    return one == other


def _shown(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
