"""How much memory a graph needs, before anything is built or run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx

from ddpm_deploy.export.attention import find_attention
from ddpm_deploy.export.graph import TensorType, constants, is_op, reads, tensor_types

_VIEWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity")

_POINTWISE = (
    *("Abs", "Add", "Cast", "Ceil", "Clip", "Cos", "Div", "Elu", "Erf", "Exp", "Floor", "Gelu"),
    *("HardSigmoid", "HardSwish", "LeakyRelu", "Log", "Max", "Min", "Mish", "Mul", "Neg", "Pow"),
    *("Reciprocal", "Relu", "Round", "Sigmoid", "Sin", "Softplus", "Sqrt", "Sub", "Tanh", "Where"),
)


@dataclass(frozen=True, kw_only=True)
class LargestTensor:
    """The largest tensor that is neither a weight nor an input.

    Attributes:
        name: Its name in the graph.
        shape: At the batch asked for.
        bytes: Its size.
    """

    name: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes that a graph needs at one batch size.

    Attributes:
        weights: Constants of the graph.
        activations: The most that is alive at once between input and output, both included.
        largest: The largest tensor on the way; None in a graph without any.
        attention: The largest matrix of an attention; 0 without attention.
        unknown: Tensors whose shape cannot be told, and which are not counted.
    """

    weights: int
    activations: int
    largest: LargestTensor | None
    attention: int
    unknown: tuple[str, ...]

    @property
    def total(self) -> int:
        """`weights` and `activations` together."""
        return self.weights + self.activations


def estimate_memory(model: onnx.ModelProto, *, batch: int) -> MemoryEstimate:
    """Estimates what a graph needs in a runtime that fuses no attention.

    It is assumed that the nodes run one by one in the order of the file; that a tensor is dropped
    after its last reader; that views copy nothing; that pointwise operators write over an input of
    their size which nobody reads later; and that every other result, softmax's too, is stored
    beside what the operator reads. Not counted: the runtime itself, workspaces of convolutions,
    alignment, copies into another layout, what happens inside subgraphs and inside the operator
    `Attention`, and what a device holds besides, such as a CUDA context.

    Args:
        model: Left as it is.
        batch: Samples, at least 1.

    Raises:
        ExportError: The shapes in the graph contradict each other.
    """
    types = tensor_types(model, batch=batch)
    fixed = constants(model.graph)
    made = [name for node in model.graph.node for name in node.output if name not in fixed if name]
    sizes = {name: _bytes(types, name) for name in made}
    known = {name: size for name, size in sizes.items() if size is not None}
    largest = max(known, key=known.__getitem__, default=None)
    return MemoryEstimate(
        weights=sum(_bytes(types, name) or 0 for name in fixed),
        activations=max(_alive(model.graph, types, set(fixed))),
        largest=None
        if largest is None
        else LargestTensor(name=largest, shape=types[largest].shape or (), bytes=known[largest]),
        attention=max((a.whole_bytes for a in find_attention(model, batch=batch)), default=0),
        unknown=tuple(name for name, size in sizes.items() if size is None),
    )


def _bytes(types: Mapping[str, TensorType], name: str) -> int | None:
    return types[name].bytes if name in types else None


def _alive(
    graph: onnx.GraphProto, types: Mapping[str, TensorType], fixed: set[str]
) -> Iterator[int]:
    """Yields the bytes alive before the first node and while each one runs.

    Every tensor lies in a buffer; a view, or what is written over an input, lies in that input's.
    """
    readers = Counter(name for node in graph.node for name in set(reads(node)))
    readers.update(value.name for value in (*graph.input, *graph.output))  # these stay
    buffer_of = {value.name: value.name for value in graph.input if value.name not in fixed}
    users = Counter({name: readers[name] for name in buffer_of})  # reads still to come, by buffer
    size = {name: _bytes(types, name) or 0 for name in buffer_of}
    yield sum(size.values())
    for node in graph.node:
        outputs = [name for name in node.output if name and name not in fixed]
        for output in outputs:
            buffer = _shared(node, output, buffer_of, users, types) or output
            buffer_of[output] = buffer
            size.setdefault(buffer, _bytes(types, output) or 0)
            users[buffer] += readers[output]
        yield sum(size.values())
        read = set(reads(node)) & buffer_of.keys()
        for name in read:
            users[buffer_of[name]] -= 1
        for buffer in {buffer_of[name] for name in (*read, *outputs)}:
            if users[buffer] == 0:
                del size[buffer]


def _shared(
    node: onnx.NodeProto,
    output: str,
    buffer_of: Mapping[str, str],
    users: Mapping[str, int],
    types: Mapping[str, TensorType],
) -> str | None:
    """Returns the buffer of an input that a node's result goes into, if one does."""
    if is_op(node, *_VIEWS):
        return buffer_of.get(node.input[0])
    if not is_op(node, *_POINTWISE):
        return None
    for name in node.input:
        same_size = name in buffer_of and _bytes(types, name) == _bytes(types, output)
        # This node is the buffer's last reader.
        if same_size and users[buffer_of[name]] == 1:
            return buffer_of[name]
    return None
