"""Faults inside the network, as far as its outputs tell; `export` compares the graphs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ddpm_deploy.arrays import Samples
from ddpm_deploy.engines.base import Engine
from ddpm_deploy.verify.cause import Cause
from ddpm_deploy.verify.suspects.evidence import Evidence, Experiment

ALONG = 0.5
"""Least share of an error that lies along a move of t, where t's embedding is the fault."""


def network_causes(evidence: Evidence) -> Iterator[Cause]:
    """Yields what explains that the network's numbers differ, or end."""
    bad = evidence.comparison.not_finite
    if bad is not None:
        half = isinstance(evidence.engine, Engine) and evidence.engine.precision == "fp16"
        whose = (
            "fed the reference's own x_t, so the network itself makes them"
            if bad.where == "local"
            else "running free alone: errors before it took x out of range"
        )
        yield Cause(
            name="overflow" if half else "not-finite",
            place="precision" if half else "network",
            says=f"Its numbers are not finite from step {bad.k} (t = {bad.t}) on"
            + (", and fp16 ends at 65504." if half else "."),
            evidence=(whose,),
            mend=_walk(evidence, "see the node")
            + (", or build with --bf16, whose range is float32's." if half else "."),
        )
    if evidence.network_is_off:
        experiment = evidence.experiment
        if experiment is not None and (cause := _embedding(evidence, experiment)):
            yield cause
        elif coarse := _coarse(evidence):
            yield coarse
        yield _somewhere(evidence)


def _embedding(evidence: Evidence, experiment: Experiment) -> Cause | None:
    """Names t's embedding where the error points where a small move of t takes the output."""
    T = experiment.spec.schedule.T  # noqa: N806
    shares = []
    for pair in evidence.worst[: len(evidence.worst) // 2 + 1]:
        t = experiment.timestep(pair)
        if not 1 <= t < T - 1:
            continue
        move = experiment.call(pair, t + 1) - experiment.call(pair, t - 1)
        error = pair.local_given.out - pair.local_wanted.out
        shares.append(abs(_cosine(error, move)))
    if not shares or np.median(shares) < ALONG:
        return None
    return Cause(
        name="half-precision-embedding",
        place="precision",
        says="The embedding of t is computed too coarsely, as half precision does.",
        evidence=(
            f"{np.median(shares):.0%} of the output's error points where a move of t takes the "
            f"output, at {len(shares)} timesteps (the median)",
        ),
        mend="Keep t, its embedding and its layers in float32; `ddpm-deploy build` does.",
    )


def _coarse(evidence: Evidence) -> Cause | None:
    """Names a coarser arithmetic where every step is off by about as much as it makes."""
    errors = [step.local.out.l2 for step in evidence.comparison.steps]
    for name, unit in (("TF32 or fp16", 2.0**-11), ("bf16", 2.0**-8)):
        if errors and min(errors) > unit / 8 and np.median(errors) < 4 * unit:
            return Cause(
                name="reduced-precision",
                place="precision",
                says=f"The deployed network's errors are of the size that {name} makes.",
                evidence=(
                    f"at each of {len(errors)} timesteps the output is off by {min(errors):.1e} "
                    f"to {max(errors):.1e} of its length; rounding one number costs {unit:.1e}",
                ),
                mend="Switch TF32 off where float32 is wanted, or give the budget of what it "
                "computes in: --budget tf32, fp16 or bf16.",
            )
    return None


def _walk(evidence: Evidence, why: str) -> str:
    """Returns what to type to walk the graph; a trace has none."""
    if isinstance(evidence.reference, Engine) and isinstance(evidence.engine, Engine):
        return f"Type --bisect to {why}"
    return f"Compare the engine with the checkpoint or its graph, and type --bisect to {why}"


def _cosine(a: Samples, b: Samples) -> float:
    length = float(np.linalg.norm(a)) * float(np.linalg.norm(b))
    return float(np.vdot(a, b)) / length if length else 0.0


def _somewhere(evidence: Evidence) -> Cause:
    """Says at which timesteps the network differs, where nothing more is known."""
    comparison = evidence.comparison
    steps = comparison.steps
    off = [step for step in steps if step.local.out.max > comparison.allowed(step.t)]
    worst = comparison.worst_local
    where = "every timestep" if len(off) == len(steps) else f"{len(off)} of {len(steps)} timesteps"
    return Cause(
        name="network",
        place="network",
        says="The network computes another function than the trained one.",
        evidence=(
            f"fed the same x_t, its output is outside the budget at {where}, by up to "
            f"{worst.local.out.max:.1e} of the peak at t = {worst.t}",
            "no change of t, label, channels, range or prediction explains it",
        ),
        mend=f"{_walk(evidence, 'find the first node that differs')}.",
    )
