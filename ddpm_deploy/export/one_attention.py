"""Attention as the one operator that ONNX Runtime has for it on the CPU.

    MatMul(q, k^T) -> [Mul, Div by a number]* -> Softmax -> MatMul(., v)

stores every score; `MultiHeadAttention` of ONNX Runtime's own domain goes through them in tiles
that stay in the cache (Dao et al. 2022, https://arxiv.org/abs/2205.14135).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ddpm_deploy.export.attention import Pattern, patterns, put
from ddpm_deploy.export.graph import (
    TensorType,
    constants,
    drop_unread,
    is_op,
    producers,
    tensor_types,
)

DOMAIN = "com.microsoft"

_HEADS_BEHIND = [0, 2, 1, 3]
"""(N, heads, rows, width) to (N, rows, heads, width), and back."""

_TURNED = {3: [0, 2, 1], 4: [0, 1, 3, 2]}


def merge_attention(model: onnx.ModelProto) -> onnx.ModelProto:
    """Writes every attention as one operator of ONNX Runtime.

    Left alone are those with a mask or a bias, in half precision, or with a free number of queries.

    Args:
        model: Opset 13 or later; not changed.

    Returns:
        The same function; the given graph itself where there is no such attention.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    types = [tensor_types(model, batch=n) for n in (2, 3)]
    merged = [found for pattern in patterns(graph) if (found := _read(graph, pattern, types))]
    if not merged:
        return model
    for pattern, nodes, shapes in merged:
        graph.initializer.extend(shapes)
        put(graph, nodes, gone={*pattern.matrices, pattern.output}, at=pattern.output)
    drop_unread(graph)
    if all(entry.domain != DOMAIN for entry in copy.opset_import):
        copy.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return copy


_Merged = tuple[Pattern, list[onnx.NodeProto], list[onnx.TensorProto]]
_Types = Sequence[Mapping[str, TensorType]]


def _read(graph: onnx.GraphProto, pattern: Pattern, types: _Types) -> _Merged | None:
    makers, fixed = producers(graph), constants(graph)
    q, of_q = _unscaled(pattern.scores.input[0], makers, fixed)
    keys, of_k = _unscaled(pattern.scores.input[1], makers, fixed)
    v = pattern.values.input[1]
    shapes = [_shape(name, types) for name in (q, keys, v)]
    of_queries, of_keys, of_values = (shape or () for shape in shapes)
    rank = len(of_queries)
    between = _scale_between(pattern, fixed, rank=rank)
    # One product of matrices a head, with keys and values of the same sample.
    if between is None or rank not in _TURNED or len(of_keys) != rank or len(of_values) != rank:
        return None
    if of_queries[:-2] != of_keys[:-2] or of_keys[:-2] != of_values[:-2]:
        return None
    scale = of_q * of_k * between
    if scale == 0 or not math.isfinite(scale):  # 0 would mean the operator's own
        return None
    builder = _Builder(pattern.output, makers, types)
    heads = of_queries[1] if rank == 4 else 1
    fed = [
        builder.rows(q, of_queries),
        builder.rows(builder.turned(keys, of_keys), (*of_keys[:-2], of_keys[-1], of_keys[-2])),
        builder.rows(v, of_values),
    ]
    builder.attend(fed, heads, scale, (*of_queries[:-1], of_values[-1]))
    return pattern, builder.nodes, builder.shapes


def _shape(name: str, types: _Types) -> tuple[int, ...] | None:
    """Returns a float32 tensor's shape without the batch, 0 in its place; None for any other."""
    two, three = (each[name].shape if name in each else None for each in types)
    if two is None or three is None or types[0][name].elem_type != onnx.TensorProto.FLOAT:
        return None
    # The batch is the first axis, alone or, in a product of three axes, times the heads.
    if not two or 3 * two[0] != 2 * three[0] or two[1:] != three[1:]:
        return None
    return (0, *two[1:])


def _unscaled(
    name: str, makers: Mapping[str, onnx.NodeProto], fixed: Mapping[str, onnx.TensorProto]
) -> tuple[str, float]:
    """Returns what a tensor is before it is multiplied with a number, and the number."""
    node = makers.get(name)
    if is_op(node, "Mul"):
        assert node is not None
        for one, other in ((0, 1), (1, 0)):
            if (factor := _number(node.input[other], fixed)) is not None:
                return node.input[one], factor
    return name, 1.0


def _scale_between(
    pattern: Pattern, fixed: Mapping[str, onnx.TensorProto], *, rank: int
) -> float | None:
    """Returns what the scores are multiplied with; None where something else is done to them."""
    scale = 1.0
    *before, softmax = pattern.between
    axis = next((a.i for a in softmax.attribute if a.name == "axis"), -1)
    if not is_op(softmax, "Softmax") or axis not in {-1, rank - 1}:
        return None
    for node in before:
        factor = _number(node.input[1], fixed)
        if factor is None or not is_op(node, "Mul", "Div"):
            return None
        scale = scale * factor if is_op(node, "Mul") else scale / factor
    return scale


def _number(name: str, fixed: Mapping[str, onnx.TensorProto]) -> float | None:
    if name not in fixed or math.prod(fixed[name].dims) != 1:
        return None
    return float(numpy_helper.to_array(fixed[name]).reshape(()))


class _Builder:
    """The nodes of one attention, with names that begin with its output's."""

    def __init__(
        self,
        output: str,
        makers: Mapping[str, onnx.NodeProto],
        types: _Types,
    ) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.shapes: list[onnx.TensorProto] = []
        self._output, self._makers, self._types = output, makers, types

    def turned(self, keys: str, shape: tuple[int, ...]) -> str:
        """Returns the keys in rows: as they were before they were turned, where they were."""
        rank = len(shape)
        node = self._makers.get(keys)
        if is_op(node, "Transpose") and _perm(node) == _TURNED[rank]:
            assert node is not None
            return str(node.input[0])
        # PyTorch's own way: Reshape to matrices, Transpose, Reshape back.
        steps = [node]
        for _ in range(2):
            steps.append(self._makers.get(steps[-1].input[0]) if steps[-1] is not None else None)
        last, turn, first = steps
        if is_op(last, "Reshape") and is_op(turn, "Transpose") and is_op(first, "Reshape"):
            assert turn is not None
            assert first is not None
            rows = (*shape[:-2], shape[-1], shape[-2])
            flat = _shape(first.output[0], self._types)
            as_matrices = flat is not None and flat[-2:] == rows[-2:]
            whole = _shape(first.input[0], self._types) == rows
            if _perm(turn) == _TURNED[3] and as_matrices and whole:
                return str(first.input[0])
        return self._node("Transpose", [keys], "keys", perm=_TURNED[rank])

    def rows(self, name: str, shape: tuple[int, ...]) -> str:
        """Returns (N, heads, rows, width) as (N, rows, heads · width)."""
        if len(shape) == 3:
            return name
        _, heads, count, width = shape
        node = self._makers.get(name)
        if is_op(node, "Transpose") and _perm(node) == _HEADS_BEHIND:
            assert node is not None
            name = node.input[0]
            before = self._makers.get(name)
            if is_op(before, "Reshape"):
                assert before is not None
                if _shape(before.input[0], self._types) == (0, count, heads * width):
                    return str(before.input[0])
        else:
            name = self._node("Transpose", [name], f"{len(self.nodes)}.turned", perm=_HEADS_BEHIND)
        return self._reshape(name, f"{len(self.nodes)}.rows", [0, count, heads * width])

    def attend(self, fed: list[str], heads: int, scale: float, shape: tuple[int, ...]) -> None:
        """Adds the operator, and what gives its output the shape that is read."""
        attributes = {"num_heads": heads, "scale": scale, "domain": DOMAIN}
        if len(shape) == 3:
            self._node("MultiHeadAttention", fed, "", **attributes)
            return
        _, _, count, width = shape
        rows = self._node("MultiHeadAttention", fed, "attended", **attributes)
        parted = self._reshape(rows, "parted", [0, count, heads, width])
        self._node("Transpose", [parted], "", perm=_HEADS_BEHIND)

    def _node(self, op: str, inputs: list[str], what: str, **attributes: Any) -> str:
        name = f"{self._output}.{what}" if what else self._output
        self.nodes.append(helper.make_node(op, inputs, [name], name=f"{name}.one", **attributes))
        return name

    def _reshape(self, name: str, what: str, shape: list[int]) -> str:
        constant = f"{self._output}.{what}.shape"
        self.shapes.append(numpy_helper.from_array(np.array(shape, np.int64), constant))
        return self._node("Reshape", [name, constant], what)


def _perm(node: onnx.NodeProto | None) -> list[int] | None:
    if node is None:
        return None
    return next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
