"""Faults in the sampler's numbers: the deployed step, given its own output, is not the table's.

Each is another table. It is named where the deployed steps follow that table to the last bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from ddpm_deploy.run import Recipe
from ddpm_deploy.sampling import SAMPLERS, Transition, predicted_x0
from ddpm_deploy.schedule import SCHEDULES, Schedule
from ddpm_deploy.spec import ModelSpec
from ddpm_deploy.verify.cause import Cause
from ddpm_deploy.verify.compare import Pair, half_state
from ddpm_deploy.verify.suspects.evidence import ARITHMETIC, Evidence
from ddpm_deploy.verify.suspects.noise import noise_causes

Rows = Callable[[Pair], Transition | None]
"""Gives the row that a fault puts in a transition's place; None where it has none."""


@dataclass(frozen=True, kw_only=True)
class Suspect:
    """A table that the deployed loop may have followed.

    Attributes:
        name: As in `Cause`.
        says: What it is, after "The deployed loop ".
        mend: What to do.
        rows: Its rows.
    """

    name: str
    says: str
    mend: str
    rows: Rows


def sampler_causes(evidence: Evidence) -> Iterator[Cause]:
    """Yields what explains that a step's arithmetic differs; its noise is for `noise_causes`."""
    known = _other_steps(evidence) or _half_state(evidence)
    if known is not None:
        yield known
    elif evidence.step_is_off:
        base = max(evidence.step_errors.values())
        suspect, left = _nearest(evidence)
        if suspect is not None and left <= min(max(ARITHMETIC, base / 1000), base / 3):
            yield Cause(
                name=suspect.name,
                place="sampler",
                says=f"The deployed loop {suspect.says}.",
                evidence=(
                    f"given its own output, its x_s differs from the reference's step by "
                    f"{base:.1e} of the peak, and from that step by {left:.1e}",
                ),
                mend=suspect.mend,
                certain=True,
            )
        elif not any(noise_causes(evidence)):
            yield _arithmetic(evidence, base)


def _nearest(evidence: Evidence) -> tuple[Suspect | None, float]:
    """Returns the suspect that leaves the smallest error, and that error."""
    best: Suspect | None = None
    least = float("inf")
    for suspect in _suspects(evidence):
        left = _left(evidence, suspect.rows)
        if left < least:
            best, least = suspect, left
    return best, least


def _other_steps(evidence: Evidence) -> Cause | None:
    """Names tables that visit other timesteps."""
    wanted, given = ([row.t for row in loop.table] for loop in evidence.loops)
    if wanted == given:
        return None
    k = next((i for i, (a, b) in enumerate(zip(wanted, given, strict=False)) if a != b), None)
    where = "" if k is None else f"; step {k + 1} is t = {given[k]} in place of {wanted[k]}"
    return Cause(
        name="other-timesteps",
        place="sampler",
        says="The deployed loop visits other timesteps.",
        evidence=(f"{len(given)} steps in place of {len(wanted)}{where}",),
        mend="Sample with the same number of steps and the same spacing.",
        certain=True,
    )


def _left(evidence: Evidence, rows: Rows) -> float:
    """Returns the largest error that other rows leave; where there is none, the reference's does.

    Infinite where there is none at all.
    """
    other = [(pair, rows(pair)) for pair in evidence.pairs]
    if all(row is None for _, row in other):
        return float("inf")
    return max(
        evidence.step_errors[pair.k] if row is None else evidence.step_error(pair, row)
        for pair, row in other
    )


def _suspects(evidence: Evidence) -> Iterator[Suspect]:
    spec, recipe = evidence.spec, evidence.recipe
    yield from _of_the_row(evidence)
    yield from _variances(spec, recipe)
    yield from _etas(evidence)
    yield from _schedules(spec, recipe)
    yield from _strides(evidence)
    yield from _samplers(spec, recipe)
    yield from _predictions(spec, recipe)


def _of_the_row(evidence: Evidence) -> Iterator[Suspect]:
    """One entry of each row is another."""

    def last(std: float) -> Rows:
        def rows(pair: Pair) -> Transition:
            row = evidence.row(pair)
            return replace(row, x_from_noise=std) if pair.k == len(evidence.table) else row

        return rows

    before, end = evidence.table[max(len(evidence.table) - 2, 0)], evidence.table[-1]
    beta = evidence.spec.schedule.beta_between(end.s, end.t)
    # β̃ is 0 in the last step, so code that adds noise there takes its neighbour's, or β.
    for std in (before.x_from_noise, math.sqrt(beta)):
        yield Suspect(
            name="noise-in-last-step",
            says="adds noise in its last step too",
            mend="Add no noise where s is the clean image (Algorithm 2: z = 0 at t = 1).",
            rows=last(std),
        )
    yield Suspect(
        name="no-noise",
        says="adds no noise",
        mend="Add σ z with fresh z in each step, or choose DDIM with eta 0 for both.",
        rows=lambda pair: replace(evidence.row(pair), x_from_noise=0.0),
    )
    yield Suspect(
        name="variance-for-deviation",
        says="multiplies its noise with σ² in place of σ",
        mend="Take the square root of the variance.",
        rows=lambda pair: replace(
            evidence.row(pair), x_from_noise=evidence.row(pair).x_from_noise ** 2
        ),
    )
    derived = evidence.recipe.loop(evidence.spec)[1].direction == "clipped"
    if evidence.recipe.sampler == "ddim" and evidence.spec.prediction == "epsilon" and derived:
        yield Suspect(
            name="ddim-direction",
            says="takes DDIM's direction from the network's output, where x_0 was clipped",
            mend="Derive ε again from the clipped x_0 (diffusers: use_clipped_model_output=True).",
            rows=lambda pair: _with_raw_direction(evidence.row(pair)),
        )
    scale = _noise_scale(evidence)
    if scale is not None:
        yield Suspect(
            name="noise-scale",
            says=f"scales its noise by {scale:.6g}",
            mend="Add σ z itself; a temperature is not part of the model.",
            rows=lambda pair: replace(
                evidence.row(pair), x_from_noise=scale * evidence.row(pair).x_from_noise
            ),
        )
    clip = evidence.table[0].clip
    other = None if clip is not None else evidence.spec.value_range[1]
    yield Suspect(
        name="wrong-clip",
        says="does not clip x_0" if other is None else f"clips x_0 to ±{other:g}",
        mend=f"Clip x_0 to ±{clip:g} before x_s is made of it."
        if clip is not None
        else "Leave x_0 unclipped.",
        rows=lambda pair: replace(evidence.row(pair), clip=other),
    )


def _with_raw_direction(row: Transition) -> Transition:
    """Returns a DDIM row whose direction is the network's ε, not that of the clipped x_0.

    √ᾱ_s x_0 + d ε with ε = (x_t - √ᾱ_t x_0) / √(1-ᾱ_t) is the row's; x_0 = (x_t - √(1-ᾱ_t) ε)/√ᾱ_t
    gives both roots.
    """
    root_t = 1.0 / row.x0_from_x if row.x0_from_x else 0.0
    noise_t = -row.x0_from_out * root_t
    return replace(
        row,
        x_from_x0=row.x_from_x0 + row.x_from_x * root_t,
        x_from_x=0.0,
        x_from_out=row.x_from_x * noise_t,
    )


def _noise_scale(evidence: Evidence) -> float | None:
    """Returns the one factor that all the noise is off by, if it is one."""
    scales = []
    for pair in evidence.pairs:
        row = evidence.row(pair)
        plain = evidence.result(pair, row, noise=False)
        if row.log_std is None and row.x_from_noise and plain is not None:
            z = evidence.noise(pair.k)
            share = float(np.vdot(pair.local_given.x - plain, z) / np.vdot(z, z))
            scales.append(share / row.x_from_noise)
    if not scales or np.ptp(scales) > 0.02 * abs(np.median(scales)):
        return None
    return float(np.median(scales))


def _variances(spec: ModelSpec, recipe: Recipe) -> Iterator[Suspect]:
    words = {"fixed_small": "β̃", "fixed_large": "β"}
    for variance, word in words.items():
        if variance != spec.variance:
            yield Suspect(
                name="wrong-variance",
                says=f"takes σ² = {word}; the reference takes "
                f"{words.get(spec.variance, 'what the network learned')}",
                mend=f"Set the variance to {spec.variance}.",
                rows=_table(spec.with_changes(variance=variance), recipe),
            )


def _etas(evidence: Evidence) -> Iterator[Suspect]:
    recipe = evidence.recipe
    if recipe.sampler != "ddim":
        return
    given = recipe.loop(evidence.spec)[1].eta
    for eta in sorted({0.0, 0.25, 0.5, 0.75, 1.0, _fitted_eta(evidence)} - {given}):
        yield Suspect(
            name="wrong-eta",
            says=f"has eta {eta:g}; the reference has {given:g}",
            mend=f"Set eta to {given:g}.",
            rows=_table(evidence.spec, replace(recipe, eta=eta)),
        )


def _fitted_eta(evidence: Evidence) -> float:
    """Returns eta to two digits, from how much of the recipe's noise is in the steps."""
    full = _table(evidence.spec, replace(evidence.recipe, eta=1.0))
    values = []
    for pair in evidence.pairs:
        row = full(pair)
        plain = evidence.result(pair, evidence.row(pair), noise=False)
        if row is None or plain is None or not row.x_from_noise:
            continue
        z = evidence.noise(pair.k)
        share = float(np.vdot(pair.local_given.x - plain, z) / np.vdot(z, z))
        values.append(share / row.x_from_noise)
    return float(np.clip(round(np.median(values), 2), 0, 1)) if values else 0.0


def _schedules(spec: ModelSpec, recipe: Recipe) -> Iterator[Suspect]:
    beta = spec.schedule.beta
    known = [
        *(make(spec.schedule.T) for make in SCHEDULES.values()),
        *(
            SCHEDULES[name](spec.schedule.T, start=start, end=end)
            for name in ("linear", "scaled_linear")
            for start, end in ((1e-4, 0.012), (8.5e-4, 0.012), (1e-4, 0.02), (1e-4, 0.01))
        ),
    ]
    for schedule in known:
        if schedule != spec.schedule:
            ends = f"{schedule.name}, β from {schedule.beta[0]:.2g} to {schedule.beta[-1]:.2g}"
            yield Suspect(
                name="wrong-schedule",
                says=f"follows another schedule: {ends}",
                mend=f"Use the schedule of training, {spec.schedule}.",
                rows=_table(spec.with_changes(schedule=schedule), recipe),
            )
    shifted = {
        "one timestep later": np.append(beta[1:], beta[-1]),
        "one timestep earlier": np.insert(beta[:-1], 0, beta[0]),
    }
    for where, values in shifted.items():
        yield Suspect(
            name="schedule-off-by-one",
            says=f"reads its schedule {where}",
            mend="Index β and ᾱ with t from 0 to T-1; the paper's t is that plus 1.",
            rows=_table(spec.with_changes(schedule=Schedule(values, "shifted")), recipe),
        )


def _strides(evidence: Evidence) -> Iterator[Suspect]:
    """The step ends at another timestep than the next one visited."""
    spec, recipe = evidence.spec, evidence.recipe

    def to(s_of: Callable[[Transition], int]) -> Rows:
        def rows(pair: Pair) -> Transition | None:
            row = evidence.row(pair)
            s = s_of(row)
            if row.s < 0:
                return row
            return _between(spec, recipe, row.t, s) if -1 <= s < row.t else None

        return rows

    for says, s_of in (
        ("goes to one timestep below the next one it visits", lambda row: row.s - 1),
        ("goes to one timestep above the next one it visits", lambda row: row.s + 1),
        ("goes down a single timestep in each step, whatever the stride", lambda row: row.t - 1),
    ):
        yield Suspect(
            name="stride-off-by-one",
            says=says,
            mend="Make each step's s the t of the next step, and the last one's -1.",
            rows=to(s_of),
        )


def _samplers(spec: ModelSpec, recipe: Recipe) -> Iterator[Suspect]:
    for sampler in SAMPLERS:
        if sampler != recipe.sampler:
            yield Suspect(
                name="wrong-sampler",
                says=f"is {sampler}; the reference is {recipe.sampler}",
                mend=f"Sample with {recipe.sampler}.",
                rows=_table(spec, replace(recipe, sampler=sampler, eta=0.0)),  # type: ignore[arg-type]
            )


def _predictions(spec: ModelSpec, recipe: Recipe) -> Iterator[Suspect]:
    for prediction in ("epsilon", "sample", "v_prediction"):
        if prediction != spec.prediction:
            yield Suspect(
                name="wrong-prediction",
                says=f"takes the output for {prediction}; it is {spec.prediction}",
                mend=f"Set the prediction to {spec.prediction}.",
                rows=_table(spec.with_changes(prediction=prediction), recipe),
            )


def _table(spec: ModelSpec, recipe: Recipe) -> Rows:
    """Returns the rows of another spec or recipe, found by their timestep."""
    try:
        rows = {row.t: row for row in recipe.table(spec)}
    except ValueError:  # this sampler does not take it
        return lambda _: None
    return lambda pair: rows.get(pair.local_wanted.t)


def _between(spec: ModelSpec, recipe: Recipe, t: int, s: int) -> Transition | None:
    try:
        return replace(recipe, steps=(t, s) if s >= 0 else (t,), spacing="leading").table(spec)[0]
    except ValueError:
        return None


def _half_state(evidence: Evidence) -> Cause | None:
    """Names a state that was rounded: float32 sums are not all half-precision numbers."""
    name = half_state(evidence.pairs)
    if name is None:
        return None
    numbers = sum(pair.given.x.size for pair in evidence.pairs)
    return Cause(
        name="half-precision-state",
        place="sampler",
        says=f"The deployed loop keeps x in {name}.",
        evidence=(f"all {numbers} numbers of its x_s looked at are {name}; the reference's not",),
        mend="Keep x_t, t and the step's sums in float32 beside any network.",
        certain=True,
    )


def _arithmetic(evidence: Evidence, base: float) -> Cause:
    """Says how much x_0, x_t and noise go into x_s, and how much the table says."""
    pair = max(evidence.pairs, key=lambda pair: evidence.step_errors[pair.k])
    row, step = evidence.row(pair), pair.local_given
    x0 = predicted_x0(row, step.x_t, step.out)
    parts = {
        "x_0": (x0, row.x_from_x0),
        "x_t": (step.x_t, row.x_from_x),
        "z": (evidence.noise(pair.k), row.x_from_noise),
    }
    basis = np.stack([values.ravel() for values, _ in parts.values()], axis=1).astype(np.float64)
    fitted, *_ = np.linalg.lstsq(basis, step.x.ravel().astype(np.float64), rcond=None)
    words = ", ".join(
        f"{have:.4g} of {name} (the table: {want:.4g})"
        for (name, (_, want)), have in zip(parts.items(), fitted, strict=True)
    )
    return Cause(
        name="sampler",
        place="sampler",
        says="The deployed loop's step is another than the table's.",
        evidence=(
            f"given its own output, its x_s differs from the reference's step by {base:.1e} of "
            "the peak",
            f"at t = {row.t} the best fit of its x_s is {words}",
        ),
        mend="Compare the step's coefficients with ddpm_deploy's table: spec.table(sampler).",
    )
