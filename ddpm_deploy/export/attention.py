"""Attention in an exported graph, and its queries cut where its matrix would be too large.

    MatMul(q, k^T) -> [Mul, Div, Add, Sub, Cast]* -> Softmax, last axis -> [Cast]* -> MatMul(., v)

A runtime that does not fuse these stores every score: batch x heads x queries x keys. A row of the
softmax depends on one query alone, so some of the queries at a time are the same function with as
small a matrix as one likes (Rabe and Staats 2021, https://arxiv.org/abs/2112.05682, who cut the
keys too; with the keys whole, a row is still normalised at once).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ddpm_deploy.errors import ExportError
from ddpm_deploy.export.graph import TensorType, consumers, is_op, tensor_types

_QUERIES = -2
"""The axis of the queries: in q, in the scores, and in what attention gives."""

_ELEMENTWISE = ("Mul", "Div", "Add", "Sub", "Cast")


@dataclass(frozen=True, kw_only=True)
class Attention:
    """An attention in a graph, with the bytes of its matrix at one batch size.

    Attributes:
        output: The tensor that it gives.
        heads: Heads; times the batch where that is a number in the graph.
        queries: Rows of a head's matrix.
        keys: Columns of a head's matrix.
        chunks: Parts that the queries are cut into; 1 is whole.
        whole_bytes: The matrix of all queries, in the widest of its element types.
        chunk_bytes: The matrix of the largest part.
    """

    output: str
    heads: int
    queries: int
    keys: int
    chunks: int
    whole_bytes: int
    chunk_bytes: int


@dataclass(frozen=True, kw_only=True)
class Split:
    """A graph whose attention matrices stay below a limit.

    Attributes:
        model: The graph; it shares nothing with the one that was given.
        attentions: What was found in the one that was given, in its order.
    """

    model: onnx.ModelProto
    attentions: tuple[Attention, ...]


@dataclass(frozen=True)
class Pattern:
    """The nodes of one attention: MatMul(q, k^T), those between, MatMul(., v)."""

    scores: onnx.NodeProto
    between: tuple[onnx.NodeProto, ...]
    values: onnx.NodeProto

    @property
    def nodes(self) -> tuple[onnx.NodeProto, ...]:
        """All of them, in order."""
        return (self.scores, *self.between, self.values)

    @property
    def output(self) -> str:
        """The tensor that the attention gives."""
        return str(self.values.output[0])

    @property
    def matrices(self) -> tuple[str, ...]:
        """The tensors with a number for each query and key."""
        return tuple(node.output[0] for node in (self.scores, *self.between))

    @property
    def operands(self) -> tuple[str, ...]:
        """What is multiplied with or added to the matrix: scales, masks, biases."""
        read = (name for node in self.between for name in node.input)
        return tuple(name for name in read if name not in self.matrices)


def find_attention(model: onnx.ModelProto, *, batch: int) -> tuple[Attention, ...]:
    """Returns the attentions of a graph, in its order.

    Left out are those whose shape cannot be told or whose queries are as many as the batch says,
    and the operator `Attention` of opset 23, which a runtime fuses or refuses itself.

    Args:
        model: Opset 13 or later: before, Softmax over an axis was another function.
        batch: Samples that the bytes are for, at least 1.

    Raises:
        ExportError: The shapes in the graph contradict each other.
    """
    return tuple(found for _, found in _found(model, tensor_types(model, batch=batch), batch))


def split_queries(model: onnx.ModelProto, *, batch: int, limit_bytes: int) -> Split:
    """Cuts the queries of every attention whose matrix is above a limit.

    The parts stand one after the other in the graph and are joined behind. They are of equal size
    if at most twice as many parts as needed make them so; else they differ by one query. The batch
    axis stays as it is, and doing it again changes nothing.

    Args:
        model: As in `find_attention`. It is not changed.
        batch: Samples at which the limit must hold, at least 1.
        limit_bytes: Bytes that the matrix of one part may take.

    Raises:
        ExportError: The scores of a single query are above the limit, or the shapes in the graph
            contradict each other.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    types = tensor_types(model, batch=batch)
    attentions = []
    for pattern, found in _found(copy, types, batch):
        sizes = _sizes(found, batch, limit_bytes)
        if len(sizes) > 1:
            _cut(copy.graph, pattern, sizes, types)
        row = found.whole_bytes // found.queries
        attentions.append(replace(found, chunks=len(sizes), chunk_bytes=row * max(sizes)))
    return Split(model=copy, attentions=tuple(attentions))


def _found(
    model: onnx.ModelProto, types: Mapping[str, TensorType], batch: int
) -> list[tuple[Pattern, Attention]]:
    next_types = tensor_types(model, batch=batch + 1)
    found = []
    for pattern in patterns(model.graph):
        shape = types[pattern.matrices[0]].shape
        next_shape = next_types[pattern.matrices[0]].shape
        if shape is None or next_shape is None or not _rows_are_queries(pattern, types):
            continue
        if shape[_QUERIES:] != next_shape[_QUERIES:]:
            continue
        matrices = math.prod(shape[:_QUERIES])
        of_one_sample = math.prod(next_shape[:_QUERIES]) - matrices
        whole = max(types[name].bytes or 0 for name in pattern.matrices)
        attention = Attention(
            output=pattern.output,
            heads=of_one_sample or matrices,
            queries=shape[_QUERIES],
            keys=shape[-1],
            chunks=1,
            whole_bytes=whole,
            chunk_bytes=whole,
        )
        found.append((pattern, attention))
    return found


def patterns(graph: onnx.GraphProto) -> Iterator[Pattern]:
    """Yields what looks like attention, in the graph's order; shapes are not looked at."""
    readers = consumers(graph)
    outputs = {value.name for value in graph.output}

    def only_reader(name: str) -> onnx.NodeProto | None:
        """Returns who reads a tensor, if nobody would miss it otherwise."""
        found = readers.get(name, [])
        return found[0] if len(found) == 1 and name not in outputs else None

    for node in graph.node:
        if is_op(node, "MatMul"):
            pattern = _pattern_from(node, only_reader)
            if pattern is not None:
                yield pattern


def _pattern_from(
    scores: onnx.NodeProto, only_reader: Callable[[str], onnx.NodeProto | None]
) -> Pattern | None:
    between: list[onnx.NodeProto] = []
    allowed = {*_ELEMENTWISE, "Softmax"}
    name = scores.output[0]
    node = only_reader(name)
    while node is not None and is_op(node, *allowed):
        if is_op(node, "Softmax"):
            allowed = {"Cast"}
        between.append(node)
        name = node.output[0]
        node = only_reader(name)
    softmaxes = [step for step in between if is_op(step, "Softmax")]
    if node is None or not is_op(node, "MatMul") or node.input[0] != name or not softmaxes:
        return None
    return Pattern(scores, tuple(between), node)


def _rows_are_queries(pattern: Pattern, types: Mapping[str, TensorType]) -> bool:
    """Says whether each row of every matrix comes from one query, and from nothing else."""

    def shape(name: str) -> tuple[int, ...]:
        return (types[name].shape if name in types else None) or ()

    scores = shape(pattern.matrices[0])
    if len(scores) < 2 or any(shape(name) != scores for name in pattern.matrices):
        return False
    softmax = next(node for node in pattern.between if is_op(node, "Softmax"))
    axis = next((a.i for a in softmax.attribute if a.name == "axis"), -1)
    if axis not in {-1, len(scores) - 1}:
        return False
    known = all(name in types and types[name].shape is not None for name in pattern.operands)
    return known and shape(pattern.scores.input[0])[_QUERIES:][:1] == scores[_QUERIES:][:1]


def _sizes(attention: Attention, batch: int, limit_bytes: int) -> list[int]:
    """Returns how many queries each part gets."""
    queries = attention.queries
    row = attention.whole_bytes // queries
    if row > limit_bytes:
        raise ExportError(
            f"The scores of one query of {attention.output} take {row} bytes at batch {batch}: "
            f"{attention.heads} heads, {attention.keys} keys; the limit is {limit_bytes}.",
            hint="Allow more memory, or ask for a smaller batch.",
        )
    needed = math.ceil(queries / (limit_bytes // row))
    parts = next((n for n in range(needed, 2 * needed + 1) if queries % n == 0), needed)
    size, larger = divmod(queries, parts)
    return [size + 1] * larger + [size] * (parts - larger)


def _cut(
    graph: onnx.GraphProto, pattern: Pattern, sizes: list[int], types: Mapping[str, TensorType]
) -> None:
    """Puts parts of an attention in its place; they carry its output's name and a number."""
    output = pattern.output
    with_queries = [
        # Without that axis, as in a mask of the keys alone, or with 1 there it suits every part.
        name
        for name in pattern.operands
        if (types[name].shape or ())[_QUERIES : _QUERIES + 1] > (1,)
    ]
    cut = list(dict.fromkeys([pattern.scores.input[0], *with_queries]))
    lengths = f"{output}.sizes"
    graph.initializer.append(numpy_helper.from_array(np.array(sizes, np.int64), lengths))

    def part_of(name: str, part: int) -> str:
        return f"{output}.{part}" if name == output else f"{output}.{part}.{name}"

    nodes = [
        helper.make_node(
            "Split",
            [name, lengths],
            [part_of(name, part) for part in range(len(sizes))],
            name=f"{output}.split.{name}",
            axis=_QUERIES,
        )
        for name in cut
    ]
    for part in range(len(sizes)):
        for node in pattern.nodes:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.name = part_of(node.name or node.output[0], part)
            for k, name in enumerate(node.input):
                # The keys and the values, second in their products, stay whole.
                of_queries = name in cut or name in pattern.matrices
                if of_queries and not (k == 1 and is_op(node, "MatMul")):
                    copy.input[k] = part_of(name, part)
            copy.output[0] = part_of(node.output[0], part)
            nodes.append(copy)
    parts = [part_of(output, part) for part in range(len(sizes))]
    nodes.append(helper.make_node("Concat", parts, [output], name=f"{output}.join", axis=_QUERIES))
    put(graph, nodes, gone={*pattern.matrices, output}, at=output)


def put(graph: onnx.GraphProto, nodes: list[onnx.NodeProto], *, gone: set[str], at: str) -> None:
    """Replaces the nodes that make `gone` with others, which stand where `at` was made."""
    kept: list[onnx.NodeProto] = []
    for node in graph.node:
        if at in node.output:
            kept.extend(nodes)
        elif not gone.intersection(node.output):
            kept.append(node)
    types = [value for value in graph.value_info if value.name == at or value.name not in gone]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(kept)
    graph.value_info.extend(types)
