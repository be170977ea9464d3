"""Two graphs of one network, walked layer by layer to the first node that is not the same.

Each tensor that both graphs have is compared twice. Its *error* is what it differs by when each
graph runs by itself on the same inputs. Its *local* error is what the nodes that make it add: they
are computed on the reference's own values. An error may grow on its way through a network with
nobody to blame, where large numbers cancel; a local error stays where it is made.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from ddpm_deploy.arrays import Array
from ddpm_deploy.errors import ExportError
from ddpm_deploy.export.graph import constants, is_op, producers, reads, tensor_types
from ddpm_deploy.export.inside import groups, one_at_a_time, shapes, values
from ddpm_deploy.export.places import places
from ddpm_deploy.export.precision import ELEM_TYPES, LARGEST
from ddpm_deploy.export.rounding import rounded

_JUMPS = 5
_PIECE = 2**20
_FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE)


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node of the engine's graph.

    Attributes:
        name: Its own, or of its first output where it has none.
        op_type: Such as `Conv`.
        output: The tensor that it makes.
        where: The module of the network that it belongs to, or follows; see `places`.
    """

    name: str
    op_type: str
    output: str
    where: str

    def __str__(self) -> str:
        return f"{self.op_type} {self.output} ({self.where})"


@dataclass(frozen=True, kw_only=True)
class TensorError:
    """How far a tensor is from the reference's, the worst of all images.

    Attributes:
        tensor: Its name in both graphs.
        node: What makes it in the engine.
        error: max |engine - reference| over max |reference|, each graph run by itself; infinite
            where the engine's is not finite and the reference's is.
        local: The same, with the node and those before it that the reference has not computed on
            the reference's values.
        input_error: The largest `error` among the compared tensors that it is made from; 0 where
            these are the graph's inputs.
        peak: max |reference|.
    """

    tensor: str
    node: Node
    error: float
    local: float
    input_error: float
    peak: float

    @property
    def growth(self) -> float:
        """`error` over `input_error`; infinite where the error begins here."""
        if self.error == 0:
            return 0.0
        return self.error / self.input_error if self.input_error else float("inf")


@dataclass(frozen=True, kw_only=True)
class NotFinite:
    """The first node that makes a number that is not finite out of finite ones.

    Attributes:
        node: The node.
        image: Number of the first image with which it does.
        value: `nan` or `inf`, what it makes.
        largest_input: Largest magnitude among what it is made from: the node's inputs, or its exact
            result, where that is finite and half precision does not reach as far.
        limit: Largest number of the half precision that the result has; None in float32.
    """

    node: Node
    image: int
    value: str
    largest_input: float
    limit: float | None

    def __str__(self) -> str:
        made = f"{self.node} makes {self.value}"
        if self.limit is not None and self.largest_input > self.limit:
            return f"{made}: {self.largest_input:.3g} is beyond {self.limit:.5g}"
        return f"{made} from numbers of at most {self.largest_input:.3g}"


@dataclass(frozen=True, kw_only=True)
class Bisection:
    """What `bisect_graphs` found.

    Attributes:
        budget: What the error of a tensor may be.
        tensors: Every compared tensor, in the engine's order.
        uncompared: Float tensors of the engine that the reference has not, or in another shape.
        not_finite: Where the engine's first number that is not finite comes from, if one is.
    """

    budget: float
    tensors: tuple[TensorError, ...]
    uncompared: int
    not_finite: NotFinite | None

    @property
    def first(self) -> TensorError | None:
        """The first tensor whose local error is beyond the budget: here something is not the same.

        None where no node by itself is beyond it. An error of the output is then a sum of many, of
        which `jumps` are the largest.
        """
        return next((t for t in self.tensors if not t.local <= self.budget), None)

    @property
    def crossing(self) -> TensorError | None:
        """The first tensor that is beyond the budget, with all that it is made from inside."""
        return next((t for t in self.tensors if not t.error <= self.budget >= t.input_error), None)

    @property
    def jumps(self) -> tuple[TensorError, ...]:
        """Up to five tensors with the largest local errors, largest first."""
        return tuple(sorted(self.tensors, key=lambda t: -t.local)[:_JUMPS])


def bisect_graphs(
    reference: onnx.ModelProto,
    engine: onnx.ModelProto,
    feeds: Mapping[str, Array],
    *,
    budget: float,
    threads: int | None = None,
) -> Bisection:
    """Compares two graphs of one network tensor by tensor, in ONNX Runtime on the CPU.

    Tensors are matched by name. The passes of this package and ONNX Runtime's keep the names of
    what they do not fuse. A graph in half precision rounds as half precision does (`rounded`).
    Both graphs run an image at a time, a few times over, and hold some 256 MiB of tensors of each
    at once, besides what a run needs.

    Args:
        reference: The graph that is right.
        engine: The graph in question; either may have its step fused, which gets zeros.
        feeds: `x`, `t` and the conditions.
        budget: Largest `relative_error` of a tensor. That of the network's output suits local
            errors: one node of a float32 graph rounds to 1e-6, which is a twentieth of it.
        threads: CPU threads; one a core when None.

    Raises:
        ExportError: The graphs have no tensor in common.
        EngineError: One of them cannot be run.
        MissingDependencyError: ONNX Runtime is not installed.
    """
    nodes = _nodes(engine)
    reference, engine = _in_float32(reference), _in_float32(engine)
    ours = _floats(engine)
    in_both = set(_floats(reference)).intersection(ours)
    _, one = next(one_at_a_time(engine, feeds))
    ordered = [name for name in ours if name in in_both]
    theirs = shapes(reference, one, ordered, threads=threads)
    sizes = shapes(engine, one, ordered, threads=threads)
    common = [name for name in ordered if theirs[name] == sizes[name]]
    if not common:
        raise ExportError(
            f"The two graphs have no tensor in common, of {len(_floats(reference))} and "
            f"{len(ours)}, so they cannot be walked side by side.",
            hint="Build both from one file: the names inside it are what is matched.",
        )
    walk = _Walk(reference, engine, common, sizes, threads)
    for _, fed in one_at_a_time(engine, feeds):
        walk.compare(fed)
    makers = producers(engine.graph)
    tensors = tuple(
        TensorError(
            tensor=name,
            node=nodes[_original(name, nodes)],
            error=walk.errors[name],
            local=walk.local[name],
            input_error=max((walk.errors[n] for n in walk.sources[name]), default=0.0),
            peak=walk.peaks[name],
        )
        for name in common
        if name in makers
    )
    broken = any(np.isinf(t.error) for t in tensors)
    return Bisection(
        budget=budget,
        tensors=tensors,
        uncompared=sum(name in nodes for name in ours) - len(common),
        not_finite=_not_finite(engine, nodes, feeds, walk.excused, threads) if broken else None,
    )


def first_not_finite(
    model: onnx.ModelProto, feeds: Mapping[str, Array], *, threads: int | None = None
) -> NotFinite | None:
    """Returns the first node that makes a number that is not finite out of finite ones, if any.

    Args:
        model: The graph, in float32 or half precision.
        feeds: `x`, `t` and the conditions.
        threads: CPU threads; one a core when None.

    Raises:
        EngineError: It cannot be run.
        MissingDependencyError: ONNX Runtime is not installed.
    """
    return _not_finite(_in_float32(model), _nodes(model), feeds, (), threads)


class _Walk:
    """Two float32 graphs, compared in groups of tensors that memory holds."""

    def __init__(
        self,
        reference: onnx.ModelProto,
        engine: onnx.ModelProto,
        common: Sequence[str],
        shape_of: Mapping[str, tuple[int, ...]],
        threads: int | None,
    ) -> None:
        self.reference, self.engine, self.threads = reference, engine, threads
        self.common = common
        self.sources = _sources(engine.graph, common)
        self.sizes = {name: 4 * int(np.prod(shape_of[name])) for name in common}
        self.errors = dict.fromkeys(common, 0.0)
        self.local = dict.fromkeys(common, 0.0)
        self.peaks = dict.fromkeys(common, 0.0)
        self.excused: set[str] = set()

    def compare(self, feeds: Mapping[str, Array]) -> None:
        """Adds an image."""
        for group in groups(self.common, self.sizes):
            self._compare(group, feeds)

    def _compare(self, group: Sequence[str], feeds: Mapping[str, Array]) -> None:
        read = {name for wanted in group for name in self.sources[wanted]}
        wanted = values(self.reference, feeds, sorted(read.union(group)), threads=self.threads)
        given = {name: wanted[name] for name in read}
        for found, fixed in ((self.errors, {}), (self.local, given)):
            got = values(self.engine, feeds, group, given=fixed, threads=self.threads)
            for name in group:
                found[name] = max(found[name], _error(got.pop(name), wanted[name]))
        for name in group:
            self.peaks[name] = max(self.peaks[name], _peak(wanted[name]))
            if not np.isfinite(wanted[name]).all():
                self.excused.add(name)


def _sources(graph: onnx.GraphProto, common: Collection[str]) -> dict[str, set[str]]:
    """Returns, for each common tensor, those it is made from through tensors that are not."""
    before: dict[str, set[str]] = {}
    sources: dict[str, set[str]] = {}
    known = set(common)
    for node in graph.node:
        found = {name for name in node.input if name in known}
        for name in node.input:
            if name not in known:
                found |= before.get(name, set())
        for name in node.output:
            before[name] = sources[name] = found
    return {name: sources[name] for name in common}


def _error(given: Array, wanted: Array) -> float:
    """Returns the `relative_error`; numbers that are not finite in the same way do not differ."""
    largest = 0.0
    for ours, theirs in zip(_pieces(given), _pieces(wanted), strict=True):
        finite = np.isfinite(ours) & np.isfinite(theirs)
        if not np.array_equal(ours[~finite], theirs[~finite], equal_nan=True):
            return float("inf")
        difference = np.abs(ours[finite] - theirs[finite])
        largest = max(largest, float(difference.max(initial=0.0)))
    return largest / (_peak(wanted) or 1.0)


def _peak(array: Array) -> float:
    """Returns the largest magnitude of the finite numbers; 0 where there is none."""
    return max(float(np.abs(p[np.isfinite(p)]).max(initial=0.0)) for p in _pieces(array))


def _pieces(array: Array) -> list[Array]:
    """Cuts an array, so that what is computed of it takes little memory."""
    return np.array_split(array.ravel(), 1 + array.size // _PIECE)


def _not_finite(
    model: onnx.ModelProto,
    nodes: Mapping[str, Node],
    feeds: Mapping[str, Array],
    excused: Collection[str],
    threads: int | None,
) -> NotFinite | None:
    """Walks a float32 graph; `excused` are tensors that are not finite in a graph that is right."""
    _, one = next(one_at_a_time(model, feeds))
    names = _floats(model)
    sizes = {n: 4 * int(np.prod(s)) for n, s in shapes(model, one, names, threads=threads).items()}
    makers = producers(model.graph)
    weights = constants(model.graph)
    limits = _limits(model.graph)
    for image, fed in one_at_a_time(model, feeds):
        peaks: dict[str, float | None] = {}  # None is not finite
        for name, value in fed.items():
            peaks[name] = _finite_peak(value)
        for group in groups(names, sizes):
            found = values(model, fed, group, threads=threads)
            for name in group:
                value = found.pop(name)
                peaks[name] = _finite_peak(value)
                if peaks[name] is not None or name in excused:
                    continue
                read = list(_float_sources(name, makers, peaks, weights))
                inputs = [peaks[n] if n in peaks else _weight_peak(weights[n]) for n in read]
                if None not in inputs:
                    return NotFinite(
                        node=nodes[_original(name, nodes)],
                        image=image,
                        value="nan" if np.isnan(value).any() else "inf",
                        largest_input=max((p for p in inputs if p is not None), default=0.0),
                        limit=limits.get(name),
                    )
    return None


def _float_sources(
    name: str,
    makers: Mapping[str, onnx.NodeProto],
    peaks: Mapping[str, float | None],
    weights: Mapping[str, TensorProto],
) -> Iterator[str]:
    """Yields the looked at tensors that one is made from, through those that are not."""
    for read in reads(makers[name]):
        if read in peaks or read in weights:
            yield read
        elif read in makers:
            yield from _float_sources(read, makers, peaks, weights)


def _finite_peak(array: Array) -> float | None:
    return _peak(array) if np.isfinite(array).all() else None


def _weight_peak(tensor: TensorProto) -> float | None:
    return _finite_peak(numpy_helper.to_array(tensor).astype(np.float64))


def _limits(graph: onnx.GraphProto) -> dict[str, float]:
    """Returns the largest number of what tensors were rounded to: casts there and back again."""
    makers = producers(graph)
    largest = {ELEM_TYPES[name]: LARGEST[name] for name in LARGEST}
    found = {}
    for node in graph.node:
        maker = makers.get(node.input[0]) if is_op(node, "Cast") else None
        if maker is not None and is_op(maker, "Cast"):
            to = next(a.i for a in maker.attribute if a.name == "to")
            if to in largest:
                found[node.output[0]] = largest[to]
    return found


def _in_float32(model: onnx.ModelProto) -> onnx.ModelProto:
    """Returns a graph that rounds as this one does, in float32."""
    types = tensor_types(model, batch=1)
    low = any(kind.elem_type in ELEM_TYPES.values() for kind in types.values())
    return rounded(model) if low else model


def _floats(model: onnx.ModelProto) -> list[str]:
    """Returns the float tensors that nodes make, in order, constants aside."""
    types = tensor_types(model, batch=1)
    return [
        name
        for node in model.graph.node
        if not is_op(node, "Constant")
        for name in node.output
        if name in types and types[name].elem_type in _FLOATS
    ]


def _nodes(model: onnx.ModelProto) -> dict[str, Node]:
    """Returns the node that makes each tensor."""
    where = places(model.graph)
    makers = producers(model.graph)
    found = {}
    for node in model.graph.node:
        for name in node.output:
            blamed = node
            if is_op(node, "Cast") and node.input[0] in _before_cast(name):
                blamed = makers.get(node.input[0], node)
            found[name] = Node(
                name=blamed.name or blamed.output[0],
                op_type=blamed.op_type,
                output=name,
                where=where[blamed.output[0]],
            )
    return found


def _before_cast(name: str) -> tuple[str, str]:
    """Returns what `convert` calls an operator's result before it is cast to its stored type."""
    return f"{name}.half", f"{name}.float"


def _original(name: str, nodes: Mapping[str, Node]) -> str:
    """Returns the tensor of the graph itself that one of its rounded form belongs to."""
    return name if name in nodes else name.rpartition(".")[0]
