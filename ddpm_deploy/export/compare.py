"""How two graphs of one network differ, read off the files: nothing is run.

What the passes of this package and ONNX Runtime do to a graph is looked through (`plain`); what is
left is compared node by node, by the names of tensors, and weight by weight.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from ddpm_deploy.arrays import Array
from ddpm_deploy.export.places import module_of
from ddpm_deploy.export.plain import Plain, PlainNode, array_of, attributes
from ddpm_deploy.export.precision import MOVES, POINTWISE
from ddpm_deploy.export.weights import change, distance

_MOST = 10
_LISTED = 3

_LITTLE = 0.2
"""Relative distance below which two sets of weights come from one training."""

_WORST_FIRST = (
    "structure",
    "other-weights",
    "operator-replaced",
    "gelu",
    "q-k-swapped",
    "wiring",
    "resize",
    "attribute",
    "epsilon",
    "constant",
    "weight-shape",
    "weight-transposed",
    "weight-flipped",
    "channels-permuted",
    "blocks-exchanged",
    "weight-truncated",
    "bias-missing",
    "weight-zero",
    "weight-scaled",
    "weight-changed",
    "weights-rounded",
)

_FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16)

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


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One thing that is not the same in two graphs.

    Attributes:
        kind: Which sort: one of `structure`, `other-weights`, `operator-replaced`, `gelu`,
            `q-k-swapped`, `wiring`, `resize`, `attribute`, `epsilon`, `constant`, `weight-shape`,
            `weight-transposed`, `weight-flipped`, `channels-permuted`, `blocks-exchanged`,
            `weight-truncated`, `bias-missing`, `weight-zero`, `weight-scaled`, `weight-changed`,
            `weights-rounded`. The last is what half precision does, and healthy by itself.
        where: The parameter or module, as the checkpoint calls it.
        says: A sentence with the values.
        evidence: The values, in JSON's types or tuples.
    """

    kind: str
    where: str
    says: str
    evidence: Mapping[str, Any] = field(default_factory=dict)


def differences(reference: onnx.ModelProto, engine: onnx.ModelProto) -> list[Difference]:
    """Returns how an engine's graph differs from the reference's: at most ten things, worst first.

    Nothing is said of a fused step, of attention cut into parts, of casts, and of what ONNX Runtime
    fuses; rounded weights are `weights-rounded`. Tensors and weights are matched by name, and
    weights without one by the node that reads them, so both should come from the same exporter.

    Args:
        reference: The graph that is right.
        engine: The graph in question.
    """
    pair = _Pair(Plain(reference), Plain(engine))
    found = [*_structure(pair), *_operators(pair), *_attributes(pair), *_wiring(pair)]
    return _worst([*found, *_weight_faults(_paired_weights(pair)), *_missing_biases(pair)])


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
    pairs = list(_checkpoint_pairs(reference, plain))
    missing = [
        _bias_missing(name)
        for name in reference
        if name.endswith("bias")
        and np.any(reference[name])
        and name not in {label for label, _, _ in pairs}
        and f"{module_of(name)}.weight" in plain.read
    ]
    return _worst([*_weight_faults(pairs), *missing])


class _Pair:
    """Two plain graphs, and the nodes that both have."""

    def __init__(self, reference: Plain, engine: Plain) -> None:
        self.reference, self.engine = reference, engine
        by_output = {name: node for node in engine.nodes.values() for name in node.outputs}
        nodes = [
            (node, by_output[node.outputs[0]])
            for node in reference.nodes.values()
            if node.outputs[0] in by_output
        ]
        numbered = [_family(a) == _family(b) for a, b in nodes if _numbered(a.outputs[0])]
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


def _family(node: PlainNode) -> str:
    return _SAME_AS.get(node.op_type, node.op_type)


def _structure(pair: _Pair) -> Iterator[Difference]:
    counts = [
        Counter(_COUNTED[f] for n in plain.nodes.values() if (f := _family(n)) in _COUNTED)
        for plain in (pair.reference, pair.engine)
    ]
    if any(n.op_type.endswith("Attention") for n in pair.engine.nodes.values()):
        return  # one node for several
    wanted, given = counts
    differing = [name for name in wanted | given if wanted[name] != given[name]]
    if not differing:
        return
    names = [p.nodes.keys() for p in (pair.reference, pair.engine)]
    gone = [pair.reference.nodes[n] for n in names[0] if n not in names[1]]
    gone = [node for node in gone if _family(node) in _COUNTED]
    yield Difference(
        kind="structure",
        where=_listed([node.where for node in gone]) or "the graph",
        says="The engine has "
        + ", ".join(f"{given[n]} {n}, the reference {wanted[n]}" for n in differing)
        + ".",
        evidence={"reference": dict(wanted), "engine": dict(given)},
    )


def _operators(pair: _Pair) -> Iterator[Difference]:
    """Yields operators in the place of others; the two forms of GELU also where written out."""
    forms: list[tuple[PlainNode, str, str]] = []
    for a, b in pair.nodes:
        wanted, given = _gelu(a, pair.reference), _gelu(b, pair.engine)
        if wanted and given:
            if wanted != given:
                forms.append((a, wanted, given))
        elif _family(a) != _family(b) and not {_family(a), _family(b)} - _COMPUTING:
            yield Difference(
                kind="operator-replaced",
                where=a.where,
                says=f"{a.outputs[0]} is made by {b.op_type}; in the reference by {a.op_type}.",
                evidence={"reference": a.op_type, "engine": b.op_type},
            )
    if forms:
        _, wanted, given = forms[0]
        yield Difference(
            kind="gelu",
            where=_listed([node.where for node, _, _ in forms]),
            says=f"GELU is computed by {given} at {_times(len(forms))}; the reference computes it "
            f"by {wanted}.",
            evidence={"reference": wanted, "engine": given, "nodes": len(forms)},
        )


_COMPUTING = {*_COUNTED, *POINTWISE, "Exp", "Log", "Pow", "Sqrt", "Sin", "Cos"}


def _gelu(node: PlainNode, plain: Plain) -> str | None:
    """Returns how GELU is computed that ends in this node; None where none does."""
    if node.op_type == "com.microsoft.FastGelu":
        return "tanh"
    if _family(node) == "Gelu":
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


def _attributes(pair: _Pair) -> Iterator[Difference]:
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
            where=_listed([node.where for node in nodes]),
            says=f"{name} of {op_type} is {given_value} at {_times(len(nodes))}; in the reference "
            f"it is {wanted_value}.",
            evidence={
                "operator": op_type,
                "attribute": name,
                "reference": wanted_value,
                "engine": given_value,
                "nodes": len(nodes),
            },
        )


def _constants(a: PlainNode, b: PlainNode, pair: _Pair) -> Iterator[tuple[Array, Array]]:
    """Yields the single numbers and the integers that two nodes read, side by side."""
    for one, other in zip(a.inputs, b.inputs, strict=False):
        wanted, given = pair.reference.weights.get(one), pair.engine.weights.get(other)
        if wanted is None or given is None or module_of(one):
            continue
        if math.prod(wanted.dims) == 1 or wanted.data_type not in _FLOATS or a.op_type == "Resize":
            yield array_of(wanted), array_of(given)


def _wiring(pair: _Pair) -> Iterator[Difference]:
    """Yields nodes that read other tensors than in the reference."""
    if not pair.names_hold:
        return
    sides = list(_attentions(pair.reference))
    swapped: dict[str, None] = {}
    for a, b in pair.nodes:
        wanted, given = _activations(a, pair), _activations(b, pair)
        same = wanted == given and a.outputs == b.outputs
        if same or _family(a) != _family(b):  # what was replaced is said by `_operators`
            continue
        if pair.engine.fused and not pair.knows(wanted, given):
            continue  # read from what ONNX Runtime made of several nodes
        at = next((side for side in sides if side.exchanged(a, b, wanted, given)), None)
        if at is not None:
            swapped[at.where] = None
        elif wanted != given:
            names = ", ".join(given), ", ".join(wanted)
            yield Difference(
                kind="wiring",
                where=a.where,
                says=f"{a.op_type} {a.outputs[0]} reads {names[0]}; in the reference it reads "
                f"{names[1]}.",
                evidence={"reference": names[1], "engine": names[0]},
            )
    yield from map(_swapped, swapped)


def _swapped(where: str) -> Difference:
    return Difference(
        kind="q-k-swapped",
        where=where,
        says=f"Queries and keys are exchanged in the attention of {where}: its scores are the "
        "reference's, transposed.",
    )


def _activations(node: PlainNode, pair: _Pair) -> list[str]:
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
        if _family(node) != "Softmax":
            continue
        scores = plain.nodes.get(node.inputs[0])
        while scores is not None and scores.op_type in {"Mul", "Div", "Add"}:
            scores = plain.nodes.get(scores.inputs[0])
        if scores is not None and _family(scores) == "MatMul":
            queries, keys = (frozenset(_moved_from(name, plain)) for name in scores.inputs[:2])
            where = scores.where.removeprefix("after ")
            yield _Attention(where, scores.outputs[0], queries, keys)


def _moved_from(name: str, plain: Plain) -> Iterator[str]:
    """Yields a tensor and those before it that hold the same numbers, or multiples."""
    yield name
    node = plain.nodes.get(name)
    if node is not None and node.op_type in {*MOVES, "Mul", "Div"} - {"Split"}:
        yield from _moved_from(node.inputs[0], plain)


_Weights = tuple[str, Array, Array]
"""What to call it, the reference's, the engine's."""


def _paired_weights(pair: _Pair) -> Iterator[_Weights]:
    """Yields the weights that both graphs have: by name, else by the nodes that read them."""
    wanted, given = pair.reference.weights, pair.engine.weights
    done = {
        name for name in wanted if module_of(name) and name in given and _is_weight(wanted, name)
    }
    for name in sorted(done):
        yield name, array_of(wanted[name]), array_of(given[name])
    for a, b in pair.nodes:
        if _family(a) != _family(b):
            continue
        read = [n for n in a.inputs if _is_weight(wanted, n) and n not in done]
        theirs = [n for n in b.inputs if _is_weight(given, n) and not module_of(n)]
        for one, other in zip(read, theirs, strict=False):
            if not module_of(one) and math.prod(wanted[one].dims) > 1 and a.op_type != "Resize":
                done.add(one)
                label = f"{a.where} ({a.op_type})"
                yield label, array_of(wanted[one]), array_of(given[other])


def _is_weight(weights: Mapping[str, TensorProto], name: str) -> bool:
    return name in weights and weights[name].data_type in _FLOATS


def _missing_biases(pair: _Pair) -> Iterator[Difference]:
    wanted, read = pair.reference.weights, pair.engine.read
    for name in wanted:
        gone = name in pair.reference.read and name not in read
        if gone and name.endswith("bias") and np.any(array_of(wanted[name])):
            yield _bias_missing(name)


def _bias_missing(name: str) -> Difference:
    return Difference(
        kind="bias-missing", where=name, says=f"{name} is added nowhere in the engine."
    )


def _checkpoint_pairs(reference: Mapping[str, Array], plain: Plain) -> Iterator[_Weights]:
    """Yields what belongs together of a state dict and a graph."""
    left = {n: a for n, a in reference.items() if a.size and a.dtype.kind == "f"}
    free: dict[str, tuple[PlainNode, Array]] = {}
    for node in plain.nodes.values():
        for name in node.inputs:
            if not _is_weight(plain.weights, name):
                continue
            array = array_of(plain.weights[name])
            if name in left:
                yield name, left.pop(name), array
            elif name not in reference and array.size > 1:
                free.setdefault(name, (node, array))
    yield from _by_place(left, free)
    yield from _by_numbers(left, free)
    for name, wanted in left.items():
        found = next((n for n, (_, a) in free.items() if _fits(wanted, a)), None)
        if found is not None:
            node, array = free.pop(found)
            yield name, _oriented(wanted, node), array


def _by_place(
    left: dict[str, Array], free: dict[str, tuple[PlainNode, Array]]
) -> Iterator[_Weights]:
    for name, wanted in list(left.items()):
        for found, (node, array) in free.items():
            if wanted.ndim > 1 and node.where == module_of(name) and _fits(wanted, array):
                yield name, _oriented(left.pop(name), node), array
                del free[found]
                break


def _by_numbers(
    left: dict[str, Array], free: dict[str, tuple[PlainNode, Array]]
) -> Iterator[_Weights]:
    for name, wanted in list(left.items()):
        for found, (node, array) in free.items():
            oriented = _oriented(wanted, node)
            if _fits(wanted, array) and distance(oriented, array) < 1e-2:
                yield name, oriented, array
                del left[name], free[found]
                break


def _fits(wanted: Array, given: Array) -> bool:
    return sorted(np.squeeze(wanted).shape) == sorted(np.squeeze(given).shape)


def _oriented(wanted: Array, node: PlainNode) -> Array:
    """Returns a linear layer's weight as a product in the graph reads it."""
    return wanted.T if _family(node) == "MatMul" and wanted.ndim == 2 else wanted


def _weight_faults(pairs: Iterator[_Weights] | Sequence[_Weights]) -> list[Difference]:
    """Says what was done to weights; to nearly all of them, once."""
    total = 0
    rounded: Counter[str] = Counter()
    far: list[float] = []
    found: list[Difference] = []
    for label, wanted, given in pairs:
        total += 1
        made = change(wanted, given)
        if made is None:
            continue
        if made.kind == "weights-rounded":
            rounded[made.evidence["type"]] += 1
            continue
        if made.kind == "weight-changed":
            far.append(made.evidence["distance"])
        kind = made.kind
        if kind == "blocks-exchanged" and made.evidence["order"] == (1, 0, 2):
            kind = "q-k-swapped"
        if kind == "weight-zero" and label.endswith("bias"):
            kind = "bias-missing"
        found.append(
            Difference(kind=kind, where=label, says=f"{label} {made.says}.", evidence=made.evidence)
        )
    if len(far) >= max(4, 0.7 * total):
        found = [d for d in found if d.kind != "weight-changed"]
        found.append(_other_weights(far, total))
    if rounded["tf32"]:  # fp16 has the same fraction; the two part where numbers are small
        rounded["tf32"] += rounded.pop("fp16", 0)
    for name, count in (+rounded).items():
        found.append(
            Difference(
                kind="weights-rounded",
                where=f"{count} of {total} weights",
                says=f"{count} of {total} weights are the reference's, rounded to {name}.",
                evidence={"type": name, "weights": count, "of": total},
            )
        )
    return found


def _other_weights(far: list[float], total: int) -> Difference:
    middle = float(np.median(far))
    little = middle < _LITTLE
    return Difference(
        kind="other-weights",
        where=f"{len(far)} of {total} weights",
        says=f"{len(far)} of {total} weights differ, by {middle:.2g} of their length in the middle "
        f"({min(far):.2g} to {max(far):.2g}): "
        + (
            "weights of another step of one training, or the averaged ones for the trained ones."
            if little
            else "the weights of another network."
        ),
        evidence={"median": middle, "least": min(far), "most": max(far), "little": little},
    )


def _worst(found: Sequence[Difference]) -> list[Difference]:
    """Puts the worst first; of a kind that is often, three and a sum of the others."""
    by_kind: dict[str, list[Difference]] = {}
    for one in found:
        by_kind.setdefault(one.kind, []).append(one)
    short = []
    for kind in sorted(by_kind, key=_WORST_FIRST.index):
        alike = by_kind[kind]
        if len(alike) > _LISTED:
            more = len(alike) - 1
            alike = [
                replace(
                    alike[0],
                    where=_listed([one.where for one in alike]),
                    says=f"{alike[0].says} So it is at {_times(more, 'other place')}.",
                )
            ]
        short += alike
    return short[:_MOST]


def _listed(where: Sequence[str]) -> str:
    names = list(dict.fromkeys(where))
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _times(count: int, what: str = "node") -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _equal(one: object, other: object) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6)
    return one == other


def _shown(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
