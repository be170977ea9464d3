"""What is wrong inside a network that `verify` found to be another, read off the graphs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ddpm_deploy.arrays import Array, Samples
from ddpm_deploy.engines.base import Engine, is_checkpoint, needs
from ddpm_deploy.errors import DDPMDeployError, ExportError
from ddpm_deploy.export.bisect import Bisection, NotFinite, TensorError, bisect_graphs
from ddpm_deploy.export.compare import differences, weight_differences
from ddpm_deploy.export.difference import Difference
from ddpm_deploy.export.lift import Calls, lift, output_error
from ddpm_deploy.export.onnx_file import load_graph, weight_files
from ddpm_deploy.export.rounding import rounded
from ddpm_deploy.export.undo import undone
from ddpm_deploy.files import sha256
from ddpm_deploy.parity import relative_error
from ddpm_deploy.verify.cause import Cause
from ddpm_deploy.verify.causes import VAGUE, merged
from ddpm_deploy.verify.compare import Side
from ddpm_deploy.verify.verification import Verification


@dataclass(frozen=True, kw_only=True)
class Walk:
    """A walk through both graphs, and what to say of it.

    Attributes:
        bisection: What was found.
        k: The transition whose x_t was fed.
        t: Its timestep.
    """

    bisection: Bisection
    k: int
    t: int

    def causes(self) -> Iterator[Cause]:
        """Yields the node that is to blame."""
        found = self.bisection
        if found.not_finite is not None:
            yield _ended(found.not_finite, self.t)
        first = found.first or found.crossing
        if first is None:
            return
        others = [_said(j) for j in found.jumps if j.local > 0 and j.tensor != first.tensor][:2]
        yield Cause(
            name="node",
            place="network",
            says=f"The first node that differs is {first.node}.",
            evidence=(
                f"{_said(first)}; on the reference's x_t at t = {self.t}, budget "
                f"{found.budget:.0e}, {len(found.tensors)} tensors compared",
                *others,
            ),
            mend="Compare that layer with the checkpoint's.",
        )

    def lines(self) -> list[str]:
        """Returns the walk in words, a line each."""
        found = self.bisection
        if not found.tensors:
            return ["no node was compared"]
        head = f"{len(found.tensors)} tensors compared at t = {self.t}"
        if found.first is None and found.not_finite is None:
            head += f"; no node by itself is beyond {found.budget:.0e}; the largest:"
        return [head, *(f"  {_said(jump)}" for jump in found.jumps if jump.local > 0)]

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON's types."""
        found = self.bisection
        return {
            "k": self.k,
            "t": self.t,
            "budget": found.budget,
            "compared": len(found.tensors),
            "uncompared": found.uncompared,
            "first": found.first and _plain(found.first),
            "jumps": [_plain(jump) for jump in found.jumps],
            "not_finite": found.not_finite and str(found.not_finite),
        }


def explain(found: Verification, reference: Side, engine: Side) -> tuple[Cause, ...]:
    """Returns a verification's causes with what the files show, the certain ones first.

    That is a stale plan, other weights, another operator, or a part in half precision. A difference
    is certain where the network is inside its budget once it is undone. A checkpoint is traced to
    be compared, which takes as long as its export.

    Args:
        found: A verification that failed.
        reference: Its reference side.
        engine: Its deployed side.
    """
    if not (isinstance(engine, Engine) and isinstance(reference, Engine)):
        return found.causes
    causes = [*_stale(reference, engine), *found.causes]
    more: list[Cause] = []
    graph, result = source_graph(engine), found.comparison
    inside = {"input", "network", "precision"}
    explained = any(cause.certain and cause.place in inside for cause in causes)
    if graph is not None and not explained and (result.network_is_off or result.not_finite):
        with suppress(DDPMDeployError):  # a graph that cannot be read has been run all the same
            more = _of_graphs(found, reference, engine, load_graph(graph))
    if any(cause.certain for cause in more):  # it is known what, so not that it is something
        causes = [cause for cause in causes if cause.name not in VAGUE]
    return merged([*more, *causes])


def _of_graphs(
    found: Verification, reference: Engine, engine: Engine, given: onnx.ModelProto
) -> list[Cause]:
    calls = _calls(found, engine)
    if parts := _parts(given, calls):
        return parts
    weights = reference.weights()
    listed = weight_differences(weights, given) if weights else []
    wanted = None
    if not any(one.kind in _ANOTHER for one in listed):
        wanted = _graph(reference)
        listed = differences(wanted, given)
    if wanted is not None and not any(one.kind in _ANOTHER for one in listed):
        before = output_error(rounded(given), calls) if calls else float("inf")
        tried = [(one, _undone(one, wanted, given, calls)) for one in listed]
        tried.sort(key=lambda each: each[1])
        return [_cause(one, engine, before, after, found) for one, after in tried]
    first = next(one for one in listed if one.kind in _ANOTHER)
    another = [cause for cause in found.causes if cause.name == "another-checkpoint"]
    return [_another(first, another[0] if another else None)]


_ANOTHER = ("structure", "other-weights", "weight-shape")
"""Differences of whole networks, of which the single ones need not be listed."""


def _another(one: Difference, files: Cause | None) -> Cause:
    """Names another network, by the files' hashes where these are known."""
    return Cause(
        name=one.kind,
        place="file",
        says=one.says if files is None else f"{files.says} {one.says}",
        evidence=() if files is None else files.evidence,
        mend="Export and build again from this checkpoint, or compare with the one it came from.",
        certain=True,
    )


def _undone(
    one: Difference, wanted: onnx.ModelProto, given: onnx.ModelProto, calls: Calls
) -> float:
    """Returns the output's error with a difference undone; infinite if that cannot be tried."""
    fixed = undone(wanted, given, one.names)
    if fixed is None or not calls:
        return float("inf")
    return output_error(rounded(fixed), calls)


def _calls(found: Verification, engine: Engine) -> Calls:
    """Returns what both networks were fed where they differ most, and the reference's output."""
    if found.recipe.guidance != 1:  # of which the kept outputs are made
        return []
    pairs = [pair for pair in found.comparison.kept if pair.finite]
    pairs.sort(key=lambda pair: -relative_error(pair.local_given.out, pair.local_wanted.out))
    return [
        (_feeds(found, engine, pair.local_given.x_t, pair.local_given.t), pair.local_wanted.out)
        for pair in pairs[:3]
    ]


def _parts(given: onnx.ModelProto, calls: Calls) -> list[Cause]:
    """Names the half-precision part without which the output is far nearer to the reference's."""
    if not calls:
        return []
    causes = []
    for one in lift(given, calls):
        if one.after < one.before / 4:
            name, words, mend = _PARTS[one.part.name]
            causes.append(
                Cause(
                    name=name,
                    place="precision",
                    says=words,
                    evidence=(
                        f"with the {len(one.part.tensors)} tensors of it in float32 the output is "
                        f"off by {one.after:.1e} of its peak; as it is, by {one.before:.1e}",
                    ),
                    mend=mend,
                    certain=True,
                )
            )
    return causes


_PARTS = {
    "conditioning": (
        "half-precision-embedding",
        "The embedding of t, or what else depends on the conditions alone, is in half precision.",
        "Keep it in float32: `ddpm-deploy build --fp16` from the float32 graph does.",
    ),
    "statistics": (
        "half-precision-statistics",
        "Normalisation or softmax is computed in half precision.",
        "Keep them in float32: `ddpm-deploy build --fp16` from the float32 graph does.",
    ),
}


def walk(
    found: Verification, reference: Engine, engine: Engine, *, threads: int | None = None
) -> Walk:
    """Walks both graphs layer by layer on the x_t where the network differs most.

    A checkpoint is traced for it, which takes as long as its export; of a plan the graph is taken
    that it was built from.

    Raises:
        ExportError: One of them has no graph here, or they have no tensor in common.
        EngineError: One of them cannot be run.
        MissingDependencyError: PyTorch or ONNX Runtime is missing.
    """
    result = found.comparison
    if result.not_finite is not None:
        k, t, x_t = result.not_finite.k, result.not_finite.t, result.not_finite.x_t
    else:
        worst = max(
            result.kept,
            key=lambda pair: float(np.abs(pair.local_given.out - pair.local_wanted.out).max()),
        )
        k, t, x_t = worst.k, worst.local_given.t, worst.local_given.x_t
    budget = result.allowed(t)
    bisection = bisect_graphs(
        _graph(reference),
        _graph(engine),
        _feeds(found, engine, x_t, t),
        budget=budget,
        threads=threads,
    )
    return Walk(bisection=bisection, k=k, t=t)


def _feeds(found: Verification, engine: Engine, x_t: Samples, t: int) -> dict[str, Array]:
    conditions = found.recipe.conditions(engine, found.images)
    if sees := engine.spec.self_condition:
        conditions[sees.name] = np.zeros_like(x_t)  # as at the first step
    return {"x": x_t, "t": np.full(len(x_t), t, np.int64), **conditions}


def source_graph(engine: Engine) -> Path | None:
    """Returns the ONNX file of an engine, or that a plan was built from, where it is here."""
    if engine.path.suffix == ".onnx":
        return engine.path
    if engine.path.suffix == ".plan":
        graph = _built_from(engine)
        return graph[0] if graph and graph[1] else None
    return None


def _built_from(engine: Engine) -> tuple[Path, bool] | None:
    """Returns the graph that a plan's sidecar names, and whether it is still the same."""
    from ddpm_deploy.engines.plan import read_record  # noqa: PLC0415

    record = read_record(engine.path)
    graph = engine.path.parent / record.graph
    if not graph.is_file():
        return None
    return graph, sha256(graph, *weight_files(graph)) == record.graph_sha256


def _stale(reference: Engine, engine: Engine) -> Iterator[Cause]:
    if engine.path.suffix != ".plan":
        return
    graph = _built_from(engine)
    if graph is not None and not graph[1]:
        yield Cause(
            name="stale-plan",
            place="file",
            says=f"{engine.path} was built from another {graph[0].name} than stands beside it.",
            evidence=(f"the SHA-256 of {graph[0]} is not the one in its sidecar",),
            mend=f"Build it again: ddpm-deploy build {graph[0]}",
            certain=reference.path == graph[0],
        )


def _graph(engine: Engine) -> onnx.ModelProto:
    path = source_graph(engine)
    if path is not None:
        return load_graph(path)
    if is_checkpoint(engine.path):
        with needs("torch", extra="export"):
            from ddpm_deploy.engines.pytorch import TorchEngine  # noqa: PLC0415
            from ddpm_deploy.export.to_onnx import trace_network  # noqa: PLC0415
        if isinstance(engine, TorchEngine):
            try:
                return trace_network(engine.network.cpu(), engine.spec)
            finally:
                engine.network.to(engine.device)
    raise ExportError(
        f"The graph that {engine.path} was built from is not here, and a plan cannot be walked.",
        hint="Copy it beside the plan, or walk the graph: ddpm-deploy verify --bisect "
        "--engine unet.onnx --against ckpt.pt",
    )


def _cause(
    one: Difference, engine: Engine, before: float, after: float, found: Verification
) -> Cause:
    bound = max((found.comparison.allowed(step.t) for step in found.comparison.steps), default=0.0)
    proved = after <= bound and after < before / 10
    evidence = "read off both files"
    if np.isfinite(after):
        evidence += (
            f"; undone, the output is off by {after:.1e} of its peak in place of {before:.1e}"
        )
    rounding = one.kind == "weights-rounded"
    if rounding and engine.precision != "fp32":
        evidence += "; rounded weights alone are what half precision does"
    return Cause(
        name=one.kind,
        place="precision" if rounding else "network",
        says=f"{one.says.removesuffix('.')} ({one.where})."
        if one.where not in one.says
        else one.says,
        evidence=(evidence,),
        mend="Export the network again from its checkpoint.",
        certain=proved,
    )


def _ended(found: NotFinite, t: int) -> Cause:
    over = found.limit is not None and found.largest_input > found.limit
    return Cause(
        name="overflow" if over else "not-finite",
        place="precision" if over else "network",
        says=f"The first node whose numbers are not finite: {found}.",
        evidence=(f"image {found.image} of those compared, at t = {t}",),
        mend="Build with --bf16, whose range is float32's, or let `build --fp16` keep the node in "
        "float32: give it --data."
        if over
        else "Look at that layer's weights and input.",
        certain=True,
    )


def _said(one: TensorError) -> str:
    return f"{one.node}: {one.local:.1e} of its peak by itself, {one.error:.1e} in all"


def _plain(one: TensorError) -> Mapping[str, Any]:
    return {
        "tensor": one.tensor,
        "node": one.node.name,
        "op_type": one.node.op_type,
        "where": one.node.where,
        "local": one.local,
        "error": one.error,
    }
