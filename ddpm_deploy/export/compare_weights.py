"""What was done to the weights of a graph, all of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from onnx import TensorProto

from ddpm_deploy.arrays import Array
from ddpm_deploy.export.difference import Difference
from ddpm_deploy.export.places import module_of
from ddpm_deploy.export.plain import Pair, Plain, PlainNode, array_of, family
from ddpm_deploy.export.weights import change, distance

FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16)

_LITTLE = 0.2
"""Relative distance below which two sets of weights come from one training."""

Weights = tuple[str, Array, Array]
"""What to call it, the reference's, the engine's."""


def paired_weights(pair: Pair) -> Iterator[Weights]:
    """Yields the weights that both graphs have: by name, else by the nodes that read them."""
    wanted, given = pair.reference.weights, pair.engine.weights
    done = {
        name for name in wanted if module_of(name) and name in given and _is_weight(wanted, name)
    }
    for name in sorted(done):
        yield name, array_of(wanted[name]), array_of(given[name])
    for a, b in pair.nodes:
        if family(a) != family(b):
            continue
        read = [n for n in a.inputs if _is_weight(wanted, n) and n not in done]
        theirs = [n for n in b.inputs if _is_weight(given, n) and not module_of(n)]
        for one, other in zip(read, theirs, strict=False):
            if not module_of(one) and math.prod(wanted[one].dims) > 1 and a.op_type != "Resize":
                done.add(one)
                label = f"{a.where} ({a.op_type})"
                yield label, array_of(wanted[one]), array_of(given[other])


def _is_weight(weights: Mapping[str, TensorProto], name: str) -> bool:
    """Says whether a tensor is a constant of real numbers."""
    return name in weights and weights[name].data_type in FLOATS


def missing_biases(pair: Pair) -> Iterator[Difference]:
    """Yields the reference's biases, other than 0, that no node of the engine reads."""
    wanted, read = pair.reference.weights, pair.engine.read
    looked_for = pair.reference.read
    if pair.engine.lowered:  # what several nodes read may be inside the one that stands for them
        nodes = (n for name, n in pair.reference.nodes.items() if name in pair.engine.nodes)
        looked_for = {name for node in nodes for name in node.inputs}
    for name in wanted:
        gone = name in looked_for and name not in read
        if gone and name.endswith("bias") and np.any(array_of(wanted[name])):
            yield bias_missing(name)


def bias_missing(name: str) -> Difference:
    """Says that a bias is added nowhere."""
    return Difference(
        kind="bias-missing", where=name, says=f"{name} is added nowhere in the engine."
    )


def checkpoint_pairs(reference: Mapping[str, Array], plain: Plain) -> Iterator[Weights]:
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
) -> Iterator[Weights]:
    for name, wanted in list(left.items()):
        for found, (node, array) in free.items():
            if wanted.ndim > 1 and node.where == module_of(name) and _fits(wanted, array):
                yield name, _oriented(left.pop(name), node), array
                del free[found]
                break


def _by_numbers(
    left: dict[str, Array], free: dict[str, tuple[PlainNode, Array]]
) -> Iterator[Weights]:
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
    return wanted.T if family(node) == "MatMul" and wanted.ndim == 2 else wanted


def weight_faults(pairs: Iterator[Weights] | Sequence[Weights]) -> list[Difference]:
    """Says what was done to weights; to nearly all of them, once."""
    total = 0
    rounded: dict[str, list[str]] = {}
    far: list[float] = []
    found: list[Difference] = []
    for label, wanted, given in pairs:
        total += 1
        made = change(wanted, given)
        if made is None:
            continue
        if made.kind == "weights-rounded":
            rounded.setdefault(made.evidence["type"], []).append(label)
            continue
        if made.kind == "weight-changed":
            far.append(made.evidence["distance"])
        kind = made.kind
        if kind == "blocks-exchanged" and made.evidence["order"] == (1, 0, 2):
            kind = "q-k-swapped"
        if kind == "weight-zero" and label.endswith("bias"):
            kind = "bias-missing"
        found.append(
            Difference(
                kind=kind,
                where=label,
                says=f"{label} {made.says}.",
                evidence=made.evidence,
                names=(label,),
            )
        )
    if len(far) >= max(4, 0.7 * total):
        found = [d for d in found if d.kind != "weight-changed"]
        found.append(_other_weights(far, total))
        rounded.clear()  # what few equal numbers look like beside so many others
    if "tf32" in rounded:  # fp16 has the same fraction; the two part where numbers are small
        rounded["tf32"] += rounded.pop("fp16", [])
    for name, labels in rounded.items():
        found.append(
            Difference(
                kind="weights-rounded",
                where=f"{len(labels)} of {total} weights",
                says=f"{len(labels)} of {total} weights are the reference's, rounded to {name}.",
                evidence={"type": name, "weights": len(labels), "of": total},
                names=tuple(labels),
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
