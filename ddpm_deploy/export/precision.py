"""Half precision, written into the graph: float32 in, mixed out.

TensorRT 11 and TensorRT-RTX know no half-precision switch; they compute in the types that the graph
states. So the types are chosen here, once, for every runtime. Convolutions and matrix products read
and write half precision, and what lies between follows them. Float32 stay, by rule:

- the conditioning: whatever does not depend on x, such as t through its embedding and its layers;
- statistics: normalisation, softmax, and the reductions, powers and exponentials they are made of;
- the first and the last convolution or matrix product, so that x is read and the output is written
  unrounded, as are the graph's inputs and outputs themselves;
- what was asked for by `keep`, such as operators whose results would overflow.

A tensor is stored once, in half precision where a half-precision product reads or writes it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import get_args

import ml_dtypes
import numpy as np
import onnx
import onnx.version_converter
from onnx import TensorProto, helper, numpy_helper

from ddpm_deploy.errors import ExportError
from ddpm_deploy.export.graph import constants, producers, tensor_types
from ddpm_deploy.export.onnx_file import metadata
from ddpm_deploy.precision import METADATA_KEY, Half, Precision, PrecisionRecord, read_precision

ELEM_TYPES: Mapping[str, int] = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
DTYPES = {"fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
LARGEST: Mapping[str, float] = {"fp16": 65504.0, "bf16": 3.3895313892515355e38}

PRODUCTS = frozenset({"Attention", "Conv", "ConvTranspose", "Gemm", "MatMul"})
MOVES = frozenset(
    {"Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "Identity", "MaxPool", "Pad"}
    | {"Reshape", "Resize", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose"}
    | {"Unsqueeze"}
)
"""Operators that give the numbers they are given (Resize: or means of neighbours)."""

POINTWISE = frozenset(
    {"Abs", "Add", "Clip", "Div", "Elu", "Erf", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu"}
    | {"Max", "Min", "Mish", "Mul", "Neg", "PRelu", "Relu", "Selu", "Sigmoid", "Sub", "Tanh"}
    | {"Where"}
)

CONDITIONING = "conditioning: does not depend on x"
STATISTICS = "statistics: normalisation, softmax, powers and sums"
ENDS = "first and last product: x is read and the output written unrounded"


def is_statistics(node: onnx.NodeProto) -> bool:
    """Tells whether a node is of normalisation, softmax, or what they are made of."""
    return node.op_type not in PRODUCTS | MOVES | POINTWISE


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """A graph in mixed precision.

    Attributes:
        model: The graph; its metadata say the same as this.
        precision: `fp16` or `bf16`.
        groups: How many operators compute in what and why, for people: the reason, then counts.
        error: max |mixed - float32| / max |float32| of the output, as `calibrate` measured it; None
            where nobody did.
    """

    model: onnx.ModelProto
    precision: Precision
    groups: Mapping[str, str]
    error: float | None = None


def convert(
    model: onnx.ModelProto,
    precision: Half,
    *,
    keep: Mapping[str, str] | None = None,
    error: float | None = None,
) -> Mixed:
    """Writes half precision into a float32 graph; a graph that has it already is given back.

    Args:
        model: As `export` writes it: inputs and outputs float32 or integer. Left as it is.
        precision: `fp16` or `bf16`.
        keep: Operators that stay float32: the name of an operator's first output, to the reason.
        error: What is known of the result, for its metadata.

    Raises:
        ExportError: The graph is in the other precision, is mixed by another tool, or branches.
        ValueError: `precision` is unknown.
    """
    if precision not in get_args(Half):
        raise ValueError(f"precision is {precision!r}; there are {', '.join(get_args(Half))}")
    if (before := recorded(model)) is not None:
        if before.precision != precision:
            raise ExportError(
                f"This graph is in {before.precision} already; {precision} cannot be made of it.",
                hint="Start from the float32 graph that export wrote.",
            )
        return before
    if precision == "bf16":
        model = _with_opset(model, 22)
    choice = _Choice(model, precision, keep or {})
    mixed = _Writer(model, choice).write()
    groups = choice.groups()
    record = PrecisionRecord(precision=precision, groups=groups, error=error)
    helper.set_model_props(mixed, {**metadata(model), METADATA_KEY: record.to_json()})
    onnx.checker.check_model(mixed, full_check=mixed.ByteSize() < 2**31)
    return Mixed(model=mixed, precision=precision, groups=groups, error=error)


@dataclass(frozen=True, kw_only=True)
class HalfOperator:
    """An operator that would compute in half precision.

    Attributes:
        name: Of its first output.
        op_type: Such as `Conv`.
        tensors: What it reads and makes in half precision, its weights included.
    """

    name: str
    op_type: str
    tensors: tuple[str, ...]


def half_operators(model: onnx.ModelProto, precision: Half) -> list[HalfOperator]:
    """Returns the operators that `convert` would put into half precision, moves aside."""
    choice = _Choice(model, precision, {})
    return [
        HalfOperator(
            name=node.output[0],
            op_type=node.op_type,
            tensors=tuple(n for n in (*node.input, *node.output) if n in choice.floats),
        )
        for node in choice.nodes
        if node.output[0] in choice.half_nodes and node.op_type not in MOVES
    ]


def float_by_rule(model: onnx.ModelProto) -> dict[str, str]:
    """Returns the operators that no low precision gets: the name of the first output, why.

    Raises:
        ExportError: The graph branches.
    """
    return dict(_Choice(model, "bf16", {}).reasons)


def recorded(model: onnx.ModelProto) -> Mixed | None:
    """Returns what a graph says of its precision; None for one in float32.

    Raises:
        ExportError: It holds half-precision tensors that this package did not choose.
        SpecError: What it says is damaged.
    """
    said = read_precision(metadata(model).get(METADATA_KEY), source="This graph")
    if said.precision != "fp32":
        return Mixed(model=model, precision=said.precision, groups=said.groups, error=said.error)
    low = {TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.FLOAT8E4M3FN, TensorProto.INT8}
    if any(tensor.data_type in low for tensor in constants(model.graph).values()):
        raise ExportError(
            "This graph holds half-precision or quantised weights already, chosen elsewhere.",
            hint="Build it as it is: --fp32 keeps every type of the graph.",
        )
    return None


class _Choice:
    """What every operator computes in, and how every tensor is stored."""

    def __init__(self, model: onnx.ModelProto, precision: Half, keep: Mapping[str, str]) -> None:
        graph = model.graph
        for node in graph.node:
            if any(a.HasField("g") or a.graphs for a in node.attribute):
                raise ExportError(
                    f"The graph branches at {_label(node)} ({node.op_type}); only plain graphs "
                    "can be made mixed.",
                    hint="Build it in float32: --fp32",
                )
        self.precision = precision
        self.elem_type = ELEM_TYPES[precision]
        self.constants = constants(graph)
        types = tensor_types(model, batch=2)
        self.floats = {n for n, kind in types.items() if kind.elem_type == TensorProto.FLOAT}
        self.outputs = {value.name for value in graph.output}
        self.reasons = self._reasons(graph, keep)
        self.nodes = [node for node in graph.node if self.activations(node) or self.made(node)]
        self.half_nodes: set[str] = set()
        self.half_tensors: set[str] = set()
        self._decide()

    def activations(self, node: onnx.NodeProto) -> list[str]:
        """The float tensors that a node reads, weights and parameters aside."""
        read = node.input[:1] if node.op_type == "Resize" else node.input
        return [name for name in read if name in self.floats and name not in self.constants]

    def made(self, node: onnx.NodeProto) -> list[str]:
        """The float tensors that a node makes."""
        return [name for name in node.output if name in self.floats and name not in self.constants]

    def groups(self) -> dict[str, str]:
        """Counts the operators by what they compute in, and why."""
        counts: dict[str, Counter[str]] = {}
        for node in self.nodes:
            if node.op_type in MOVES or not self.made(node):
                continue
            name = node.output[0]
            reason = self.reasons.get(name, "between float32 operators")
            group = str(self.precision) if name in self.half_nodes else f"float32, {reason}"
            counts.setdefault(group, Counter())[node.op_type] += 1
        return {
            group: ", ".join(f"{n} {kind}" for kind, n in sorted(counted.items()))
            for group, counted in sorted(counts.items())
        }

    def _reasons(self, graph: onnx.GraphProto, keep: Mapping[str, str]) -> dict[str, str]:
        reasons: dict[str, str] = {}
        known = {node.output[0] for node in graph.node}
        if unknown := keep.keys() - known:
            raise ValueError(f"keep names {sorted(unknown)}; the graph has no such operators")
        dependent = {"x"}
        for node in graph.node:
            if dependent.intersection(node.input):
                dependent.update(node.output)
            else:
                reasons[node.output[0]] = CONDITIONING
            if is_statistics(node):
                reasons.setdefault(node.output[0], STATISTICS)
            elif any(
                np.abs(_values(self.constants[name])).max(initial=0) > LARGEST[self.precision]
                for name in node.input
                if name in self.constants and name in self.floats
            ):
                reasons.setdefault(node.output[0], f"a constant is beyond {self.precision}")
        for node in (*self._first(graph), *self._last(graph)):
            reasons.setdefault(node.output[0], ENDS)
        for node in graph.node:
            if node.output[0] in keep:
                reasons[node.output[0]] = keep[node.output[0]]
        return reasons

    def _first(self, graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
        """Yields the products that read x, with at most moves and pointwise operators before."""
        near = {"x"}
        for node in graph.node:
            if near.intersection(node.input):
                if node.op_type in PRODUCTS:
                    yield node
                elif node.op_type in MOVES | POINTWISE:
                    near.update(node.output)

    def _last(self, graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
        """Yields the products that the outputs come from, with one way to each."""
        made_by = producers(graph)
        for name in self.outputs:
            node = made_by.get(name)
            while node is not None and node.op_type not in PRODUCTS:
                read = self.activations(node)
                node = made_by.get(read[0]) if len(read) == 1 else None
            if node is not None:
                yield node

    def _decide(self) -> None:
        wanted: set[str] = set()  # what some half-precision product reads
        for node in reversed(self.nodes):
            free = node.output[0] not in self.reasons
            if free and (
                node.op_type in PRODUCTS
                or (node.op_type in MOVES and wanted.intersection(self.made(node)))
            ):
                wanted.update(self.activations(node))
        wanted -= self.outputs
        for node in self.nodes:
            read, made = self.activations(node), self.made(node)
            halves = bool(read) and self.half_tensors.issuperset(read)
            if node.output[0] in self.reasons:
                half = False
            elif node.op_type in PRODUCTS:
                half = True
            elif node.op_type in MOVES:
                half = halves or bool(wanted.intersection(made))
            else:
                half = halves
            if half:
                self.half_nodes.add(node.output[0])
            self.half_tensors.update(
                name for name in made if name not in self.outputs and (half or name in wanted)
            )


class _Writer:
    """Writes a graph anew with the chosen types; casts stand where the type changes."""

    def __init__(self, model: onnx.ModelProto, choice: _Choice) -> None:
        self.source = model
        self.choice = choice
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, onnx.TensorProto] = {}
        self.casts: dict[str, str] = {}
        self.taken = {name for node in model.graph.node for name in (*node.input, *node.output)}

    def write(self) -> onnx.ModelProto:
        choice, source = self.choice, self.source
        for node in source.graph.node:
            half = node.output[0] in choice.half_nodes
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            first = slice(1) if node.op_type == "Resize" else slice(None)
            for i, name in enumerate(node.input[first]):
                copy.input[i] = self._read(name, half=half)
            after = []
            for i, name in enumerate(node.output):
                if name in choice.made(node) and half != (name in choice.half_tensors):
                    copy.output[i] = self._name(f"{name}.{'half' if half else 'float'}")
                    to = TensorProto.FLOAT if half else choice.elem_type
                    after.append(_cast(copy.output[i], name, to))
            self.nodes += [copy, *after]
        mixed = onnx.ModelProto()
        mixed.CopyFrom(source)
        graph = mixed.graph
        del graph.node[:], graph.value_info[:], graph.initializer[:]
        graph.node.extend(self._used())
        read = {name for node in graph.node for name in node.input} | choice.outputs
        graph.initializer.extend(
            tensor
            for tensor in (*source.graph.initializer, *self.weights.values())
            if tensor.name in read
        )
        return mixed

    def _read(self, name: str, *, half: bool) -> str:
        """Returns the name under which a node reads a tensor in its own type."""
        choice = self.choice
        if name not in choice.floats:
            return name
        if name in choice.constants:
            return self._weight(name) if half else name
        if half == (name in choice.half_tensors):
            return name
        if name not in self.casts:
            self.casts[name] = self._name(f"{name}.{'half' if half else 'float'}")
            to = choice.elem_type if half else TensorProto.FLOAT
            self.nodes.append(_cast(name, self.casts[name], to))
        return self.casts[name]

    def _weight(self, name: str) -> str:
        if name not in self.weights:
            values = _values(self.choice.constants[name])
            self.weights[name] = numpy_helper.from_array(
                values.astype(DTYPES[self.choice.precision]), self._name(f"{name}.half")
            )
        return self.weights[name].name

    def _name(self, wanted: str) -> str:
        while wanted in self.taken:
            wanted += "_"
        self.taken.add(wanted)
        return wanted

    def _used(self) -> Iterator[onnx.NodeProto]:
        """Yields the nodes, without constants that only their half-precision copies replace."""
        read = {name for node in self.nodes for name in node.input} | self.choice.outputs
        for node in self.nodes:
            if node.op_type != "Constant" or read.intersection(node.output):
                yield node


def _with_opset(model: onnx.ModelProto, least: int) -> onnx.ModelProto:
    """Returns the model in a later opset: bfloat16 convolutions are in ONNX from opset 22 on."""
    opset = max(entry.version for entry in model.opset_import if entry.domain in {"", "ai.onnx"})
    if opset >= least:
        return model
    try:
        return onnx.version_converter.convert_version(model, least)
    except (RuntimeError, ValueError) as error:  # an operator that onnx has no way for
        raise ExportError(
            f"bfloat16 needs opset {least}; this graph is of opset {opset}, and onnx cannot carry "
            f"it over: {' '.join(str(error).split())[:300]}",
            hint=f"Export it with --opset {least}, or type --fp16.",
        ) from error


def _cast(name: str, to_name: str, elem_type: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [name], [to_name], name=f"cast_{to_name}", to=elem_type)


def _values(tensor: onnx.TensorProto) -> np.ndarray:
    return numpy_helper.to_array(tensor)


def _label(node: onnx.NodeProto) -> str:
    return node.name or node.output[0]
