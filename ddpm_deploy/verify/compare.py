"""How far a deployed loop is from the trained model's, at every timestep.

Two errors: *local*, where both sides are fed the same x_t, is the deployed step's fault alone;
*accumulated*, where each runs free on the same noise, is what a user sees in the images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from ddpm_deploy.arrays import Pixels, Samples
from ddpm_deploy.engines.base import Engine
from ddpm_deploy.errors import ParityError, TraceError
from ddpm_deploy.images import to_pixels
from ddpm_deploy.parity import TOLERANCE
from ddpm_deploy.precision import to_bf16, to_fp16
from ddpm_deploy.run import Recipe
from ddpm_deploy.sampling import Step, Table
from ddpm_deploy.spec import Condition, ModelSpec
from ddpm_deploy.verify.budget import Budget
from ddpm_deploy.verify.loops import Loop, engine_loop, shared_noise
from ddpm_deploy.verify.measures import Errors, PictureErrors
from ddpm_deploy.verify.trace import Trace, chosen_steps

SAME_MODEL = (
    "sample_shape",
    "schedule",
    "prediction",
    "variance",
    "clip",
    "value_range",
    "rounding",
    "first_timestep",
    "timestep",
    "conditions",
    "guidance",
    "restore",
)
"""Fields of the spec in which two engines of one model agree."""

KEPT = 24
"""Steps whose numbers are kept, for the causes and the report."""

KEPT_BYTES = 2**26
"""What they may take; fewer are kept where samples are large."""

Side = Engine | Loop | Trace
"""What can be compared: an engine's loop, a loop of one's own, or a recorded one."""


@dataclass(frozen=True, kw_only=True)
class StepParts:
    """The errors of a step's three quantities.

    Attributes:
        out: Of the network's output.
        x0: Of x_0.
        x: Of x_s, the result.
    """

    out: Errors
    x0: Errors
    x: Errors

    @classmethod
    def between(cls, given: Step, wanted: Step) -> StepParts:
        """Measures a step against the one wanted."""
        return cls(
            out=Errors.between(given.out, wanted.out),
            x0=Errors.between(given.x0, wanted.x0),
            x=Errors.between(given.x, wanted.x),
        )


@dataclass(frozen=True, kw_only=True)
class StepErrors:
    """One transition's errors.

    Attributes:
        k: 1 for the first transition, the noisiest.
        t: The reference's timestep.
        local: Both sides fed the same x_t.
        accumulated: Each running free.
    """

    k: int
    t: int
    local: StepParts
    accumulated: StepParts


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The numbers of one transition on both sides.

    Attributes:
        k: 1 for the first transition.
        wanted: The reference's step, running free.
        given: The deployed side's, running free.
        local_wanted: The reference's step from the x_t that both were fed.
        local_given: The deployed side's from the same.
    """

    k: int
    wanted: Step
    given: Step
    local_wanted: Step
    local_given: Step

    @property
    def finite(self) -> bool:
        """Tells whether the deployed side's numbers are."""
        return self.given.finite and self.local_given.finite


@dataclass(frozen=True, kw_only=True)
class NotFinite:
    """The first numbers of the deployed side that are not finite.

    Attributes:
        k: The transition.
        t: Its timestep.
        x_t: float32, (N, *sample_shape): what it was fed then; finite, but where a trace left out
            the steps before.
        where: `local` where the reference's own x_t is enough, else `accumulated`.
    """

    k: int
    t: int
    x_t: Samples
    where: Literal["local", "accumulated"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was compared with what it may be.

    Attributes:
        name: Which: `local/out/max`, `pixels`, `spec/schedule`, ...
        passed: Whether it is inside.
        says: A sentence with its values.
        value: The number, where it is one.
        bound: What it may be.
        t: The timestep at which it is worst.
    """

    name: str
    passed: bool
    says: str
    value: float | None = None
    bound: float | None = None
    t: int | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a `Verifier` found.

    Attributes:
        steps: The transitions compared, noisiest first; stops at the first that is not finite.
        not_finite: Where the deployed side's numbers first were not finite, if anywhere.
        pictures: The last step's errors in 8 bits; None where it was not reached.
        budget: What was allowed.
        spec_differences: Fields that differ between the two specs, with both values.
        lengths: Transitions of the reference's table and of the deployed side's.
        kept: The numbers of some of the transitions.
    """

    steps: tuple[StepErrors, ...]
    not_finite: NotFinite | None
    pictures: PictureErrors | None
    budget: Budget
    spec_differences: Mapping[str, str]
    lengths: tuple[int, int]
    kept: tuple[Pair, ...]

    @property
    def worst_local(self) -> StepErrors:
        """The step whose network output differs most on the same x_t."""
        return max(self.steps, key=lambda step: step.local.out.max)

    @property
    def worst_accumulated(self) -> StepErrors:
        """The step after which x differs most, running free."""
        return max(self.steps, key=lambda step: step.accumulated.x.max)

    @property
    def amplification(self) -> float | None:
        """The largest accumulated error of x over the largest local one; None without the latter.

        Below 1 the loop forgets what a step does wrong, above 1 it adds up or grows.
        """
        local = max((step.local.x.max for step in self.steps), default=0.0)
        free = max((step.accumulated.x.max for step in self.steps), default=0.0)
        return free / local if local > 0 else None

    def allowed(self, t: int) -> float:
        """Returns what the network's output may be off by at a timestep, fed the same x_t."""
        return self.budget.bound_at("local", "out", t) or TOLERANCE

    @property
    def network_is_off(self) -> bool:
        """Tells whether the network itself differs by more than that, at any timestep."""
        return any(step.local.out.max > self.allowed(step.t) for step in self.steps)

    @cached_property
    def checks(self) -> tuple[Check, ...]:
        """All that was compared with the budget, in the order of the loop."""
        return (*self._spec_checks(), *self._step_checks(), *self._picture_checks())

    @property
    def failures(self) -> list[str]:
        """What is outside the budget, a line each; empty when the engine is the same model."""
        return [check.says for check in self.checks if not check.passed]

    @property
    def passed(self) -> bool:
        """Tells whether all is inside the budget."""
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON's types; an infinite PSNR becomes null."""
        return plain(
            {
                "passed": self.passed,
                "failures": self.failures,
                "checks": [asdict(check) for check in self.checks],
                "budget": self.budget.to_dict(),
                "not_finite": self.not_finite
                and {name: getattr(self.not_finite, name) for name in ("k", "t", "where")},
                "amplification": self.amplification,
                "pictures": self.pictures and asdict(self.pictures),
                "steps": [asdict(step) for step in self.steps],
            }
        )

    def _spec_checks(self) -> Iterator[Check]:
        for name, values in self.spec_differences.items():
            yield Check(
                name=f"spec/{name}", passed=False, says=f"the specs differ in {name}: {values}"
            )
        reference, deployed = self.lengths
        if reference != deployed:
            yield Check(
                name="steps",
                passed=False,
                says=f"the reference's loop has {reference} steps, the engine's {deployed}",
            )

    def _step_checks(self) -> Iterator[Check]:
        bad = self.not_finite
        yield Check(
            name="finite",
            passed=bad is None,
            says="all numbers are finite"
            if bad is None
            else f"numbers are not finite from t = {bad.t} (step {bad.k}) on",
            t=None if bad is None else bad.t,
        )
        half = half_state(self.kept)
        yield Check(
            name="state",
            passed=half is None,
            says="x is float32 in the loop" if half is None else f"x is {half} in the loop",
        )
        for limit in self.budget.limits:
            worst = limit.worst(self.steps)
            if worst is None:
                yield Check(
                    name=limit.name, passed=True, says=f"{limit.name}: no timestep of it was seen"
                )
                continue
            value = limit.value(worst)
            yield Check(
                name=limit.name,
                passed=limit.allows(value),
                says=f"{limit.error} error of {_SAID[limit.quantity]}: {limit.measure} "
                f"{value:.2g} at t = {worst.t}; budget {limit.bound:.2g}{limit.where}",
                value=value,
                bound=limit.bound,
                t=worst.t,
            )

    def _picture_checks(self) -> Iterator[Check]:
        if self.pictures is None:
            return
        yield Check(
            name="pixels",
            passed=self.pictures.close >= self.budget.pixels,
            says=f"{self.pictures.close:.2%} of pixels are within one level; "
            f"budget {self.budget.pixels:.2%}",
            value=self.pictures.close,
            bound=self.budget.pixels,
        )
        if self.budget.equal:
            yield Check(
                name="equal",
                passed=self.pictures.equal >= self.budget.equal,
                says=f"{self.pictures.equal:.2%} of pixels are equal; "
                f"budget {self.budget.equal:.2%}",
                value=self.pictures.equal,
                bound=self.budget.equal,
            )
        bias = self.pictures.bias
        yield Check(
            name="bias",
            passed=abs(bias) <= self.budget.bias,
            says="pixels are as bright as the reference's"
            if bias == 0
            else f"pixels are {abs(bias):.2g} levels too {'dark' if bias < 0 else 'bright'} in "
            f"the mean; budget {self.budget.bias:.2g}",
            value=bias,
            bound=self.budget.bias,
        )
        for name, bound in (("psnr", self.budget.psnr), ("ssim", self.budget.ssim)):
            values = getattr(self.pictures, name)
            if bound is not None and values:
                worst = min(values)
                yield Check(
                    name=name,
                    passed=worst >= bound,
                    says=f"{name.upper()} of image {values.index(worst)} is "
                    f"{'infinite' if worst == float('inf') else f'{worst:.4g}'}; "
                    f"budget {bound:.4g}",
                    value=worst,
                    bound=bound,
                )


_VALUES = 8
"""Different numbers of x, from which on their precision tells that of the loop."""

_SAID = {"out": "the output", "x0": "x_0", "x": "x"}


def half_state(pairs: Sequence[Pair]) -> str | None:
    """Returns `fp16` or `bf16` where the deployed x are all numbers of it, the reference's not.

    Clipped numbers are numbers of both whatever the loop keeps, so a few values say nothing.
    """
    if all(len(np.unique(pair.given.x)) < _VALUES for pair in pairs):
        return None
    for name, to in (("fp16", to_fp16), ("bf16", to_bf16)):
        given = bool(pairs) and all(np.array_equal(to(p.given.x), p.given.x) for p in pairs)
        if given and not any(np.array_equal(to(p.wanted.x), p.wanted.x) for p in pairs):
            return name
    return None


def differing_fields(reference: ModelSpec, engine: ModelSpec) -> dict[str, str]:
    """Returns what two specs of one model should agree in and do not: the field, both values."""
    return {
        name: f"{_short(getattr(reference, name))} in the reference, "
        f"{_short(getattr(engine, name))} in the engine"
        for name in SAME_MODEL
        if getattr(reference, name) != getattr(engine, name)
    }


class Verifier:
    """Compares a deployed loop with a reference's, step by step.

    Iterate over it for a `StepErrors` a transition, then read `result`. Each side follows the table
    that its own spec gives for the recipe. Where the deployed side is a trace, *local* feeds the
    reference the trace's x_t.

    Args:
        reference: The trained model: a checkpoint's engine, another engine, or a trace.
        engine: The deployed one.
        recipe: Sampler, seed and labels of the loop; a trace's own where one of them is a trace.
        images: Indices of the images to draw; a trace's own where one of them is a trace.
        budget: What the engine may differ by; float32's when None. A general one is fitted to the
            loop, see `Budget.over`.

    Raises:
        ParityError: The two are not the same kind of model, or both are traces.
        TraceError: A trace is of another model than the other side.
        EngineInputError: A network does not take these labels or guidance.
        ValueError: The recipe does not fit a network's schedule.
    """

    def __init__(
        self,
        reference: Side,
        engine: Side,
        recipe: Recipe | None = None,
        images: Sequence[int] = range(4),
        *,
        budget: Budget | None = None,
    ) -> None:
        if isinstance(reference, Trace) and isinstance(engine, Trace):
            raise ParityError(
                "Both sides are traces; one of them must be able to compute.",
                hint="Give the checkpoint or an engine for one of them.",
            )
        _check_same_shape(reference, engine)
        trace = next((side for side in (reference, engine) if isinstance(side, Trace)), None)
        if trace is not None:
            check_origin(trace, engine if trace is reference else reference)
            recipe, images = trace.recipe, trace.images
        recipe = recipe or Recipe()
        if recipe.sampler is None:  # the family's own is the deployed side's, for both
            recipe = replace(recipe, sampler=engine.spec.sampler)
        self.recipe, self.images = recipe, images
        self.reference, self.engine = reference, engine
        self.noise = shared_noise(recipe, images, engine.spec)
        self.loops = self._reference, self._engine = (self._loop(reference), self._loop(engine))
        self.table = self._reference.table
        values = len(images) * int(np.prod(engine.spec.sample_shape))
        self.budget = (budget or Budget.of("fp32")).over(gain(self.table), values=values)
        self._lengths = len(self._reference.table), len(self._engine.table)
        self._compared = self._which()
        self._differences = differing_fields(reference.spec, engine.spec)
        self._keep = set(_kept(self._compared, engine.spec, len(images)))
        self._steps: list[StepErrors] = []
        self._pairs: list[Pair] = []
        self._worst: tuple[float, Pair] | None = None
        self._not_finite: NotFinite | None = None
        self._last: tuple[Samples, Samples] | None = None

    def _loop(self, side: Side) -> Loop | Trace:
        if isinstance(side, Engine):
            return engine_loop(side, self.recipe, self.images, noise=self.noise)
        return side

    def __len__(self) -> int:
        return len(self._compared)

    def __iter__(self) -> Iterator[StepErrors]:
        loops = [side for side in (self._reference, self._engine) if isinstance(side, Loop)]
        try:
            for pair in self._walk():
                if not pair.wanted.finite:
                    raise ParityError(
                        "The reference itself gives numbers that are not finite at "
                        f"t = {pair.wanted.t}.",
                        hint="Was the checkpoint trained to the end? Compare another one.",
                    )
                if not pair.finite:
                    self._not_finite = _where(pair)
                    return
                yield self._measured(pair)
        finally:
            for loop in loops:
                loop.close()

    def _measured(self, pair: Pair) -> StepErrors:
        errors = StepErrors(
            k=pair.k,
            t=pair.wanted.t,
            local=StepParts.between(pair.local_given, pair.local_wanted),
            accumulated=StepParts.between(pair.given, pair.wanted),
        )
        if self._worst is None or errors.local.out.max > self._worst[0]:
            self._worst = errors.local.out.max, pair
        if pair.k in self._keep:
            self._pairs.append(pair)
        self._steps.append(errors)
        self._last = pair.wanted.x, pair.given.x
        return errors

    def _walk(self) -> Iterator[Pair]:
        """Yields the transitions that are compared."""
        match self._reference, self._engine:
            case Loop() as reference, Loop() as engine:
                yield from _both(reference, engine, len(self))
            case Trace() as trace, Loop() as engine:
                given = None
                for k in range(1, max(self._compared, default=0) + 1):
                    given = _next(engine, k, given)
                    if k in trace.steps:
                        wanted = trace.steps[k]
                        local = _again(engine, given, wanted)
                        yield Pair(
                            k=k, wanted=wanted, given=given, local_wanted=wanted, local_given=local
                        )
                    elif not given.finite:
                        self._not_finite = NotFinite(
                            k=k, t=given.t, x_t=given.x_t, where="accumulated"
                        )
                        return
            case Loop() as reference, Trace() as trace:
                free = None
                for k in range(1, max(self._compared, default=0) + 1):
                    free = wanted = _next(reference, k, free)
                    if k in trace.steps:
                        given = trace.steps[k]
                        sound = np.isfinite(given.x_t).all()
                        local = _again(reference, wanted, given) if sound else wanted
                        # Nothing local can be told where x_t is beyond what the reference bears.
                        local = local if local.finite else wanted
                        yield Pair(
                            k=k, wanted=wanted, given=given, local_wanted=local, local_given=given
                        )

    def _which(self) -> list[int]:
        shorter = min(self._lengths)
        recorded = [
            set(side.steps) for side in (self._reference, self._engine) if isinstance(side, Trace)
        ]
        every = range(1, shorter + 1)
        return [k for k in every if all(k in steps for steps in recorded)]

    @property
    def result(self) -> Comparison:
        """What the iteration found so far."""
        kept = {pair.k: pair for pair in self._pairs}
        if self._worst is not None:
            kept[self._worst[1].k] = self._worst[1]
        return Comparison(
            steps=tuple(self._steps),
            not_finite=self._not_finite,
            pictures=self._pictures(),
            budget=self.budget,
            spec_differences=self._differences,
            lengths=self._lengths,
            kept=tuple(kept[k] for k in sorted(kept)),
        )

    def pixels(self) -> tuple[Pixels, Pixels] | None:
        """Returns the last pictures of the reference and of the deployed side.

        Each uint8, (N, H, W, C); samples of other ranks are one row. None where the loop did not
        come to its end.
        """
        if self._last is None or {self._steps[-1].k} != set(self._lengths):
            return None
        wanted, given = (
            final_pixels(x, side)
            for x, side in zip(self._last, (self._reference, self._engine), strict=True)
        )
        return wanted, given

    def _pictures(self) -> PictureErrors | None:
        pixels = None if self._not_finite else self.pixels()
        return None if pixels is None else PictureErrors.between(pixels[1], pixels[0])


def gain(table: Table) -> float:
    """Returns the largest part of an error of the network's output that a step puts into x."""
    return max(abs(row.x_from_x0 * row.x0_from_out + row.x_from_out) for row in table)


def check_origin(trace: Trace, other: Side) -> None:
    """Refuses a trace of another model.

    Raises:
        TraceError: Both say what checkpoint they come from, and it is not the same.
    """
    theirs, ours = trace.spec.checkpoint_sha256, other.spec.checkpoint_sha256
    if theirs and ours and theirs != ours:
        raise TraceError(
            f"The trace is of the checkpoint with SHA-256 {theirs[:12]}…, and "
            f"{getattr(other, 'path', 'the other side')} comes from {ours[:12]}….",
            hint="Record it beside the right checkpoint: ddpm-deploy trace ckpt.pt",
        )


def _both(reference: Loop, engine: Loop, count: int) -> Iterator[Pair]:
    wanted, given = None, None
    for k in range(1, count + 1):
        wanted, given = _next(reference, k, wanted), _next(engine, k, given)
        local = _again(engine, given, wanted)
        yield Pair(k=k, wanted=wanted, given=given, local_wanted=wanted, local_given=local)


def _next(loop: Loop, k: int, last: Step | None) -> Step:
    """Returns a loop's step after `last`, its first one where that is None."""
    if last is None:
        return loop.step(k, loop.start())
    return loop.step(k, last.x, last.x0) if loop.looks_back else loop.step(k, last.x)


def _again(loop: Loop, step: Step, other: Step) -> Step:
    """Returns a loop's step from another's state, which is `step` where that began there."""
    alike = np.array_equal(step.x_t, other.x_t)
    if not loop.looks_back:
        return step if alike else loop.step(step.k, other.x_t)
    if step.before is None or other.before is None:
        return step if alike else loop.step(step.k, other.x_t)
    if alike and np.array_equal(step.before, other.before):
        return step
    return loop.step(step.k, other.x_t, other.before)


def _where(pair: Pair) -> NotFinite:
    local = bool(np.isfinite(pair.local_given.x_t).all()) and not pair.local_given.finite
    step = pair.local_given if local else pair.given
    return NotFinite(k=pair.k, t=step.t, x_t=step.x_t, where="local" if local else "accumulated")


def _check_same_shape(reference: Side, engine: Side) -> None:
    if reference.spec.sample_shape != engine.spec.sample_shape:
        raise ParityError(
            f"{_called(reference, 'The reference')} makes samples of "
            f"{reference.spec.sample_shape}, {_called(engine, 'the engine')} of "
            f"{engine.spec.sample_shape}.",
            hint="Give the checkpoint that the engine was exported from.",
        )


def _called(side: Side, name: str) -> str:
    return str(side.path) if isinstance(side, Engine) else name


def _kept(compared: Sequence[int], spec: ModelSpec, images: int) -> list[int]:
    a_step = 16 * images * int(np.prod(spec.sample_shape)) * 4
    keep = max(6, min(KEPT, KEPT_BYTES // a_step))
    return [compared[i - 1] for i in chosen_steps(len(compared), keep)] if compared else []


def final_pixels(x: Samples, side: Loop | Trace) -> Pixels:
    """Returns the pictures that a side makes of its last state, as in `Verifier.pixels`."""
    if isinstance(side, Trace) and side.pictures is not None:
        return side.pictures
    return to_pixels(
        x if x.ndim == 4 else x.reshape(len(x), 1, 1, -1),
        value_range=side.spec.value_range,
        rounding=side.spec.rounding,
    )


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a record in JSON's types, in which there are no infinite numbers."""
    return {key: _plain(value) for key, value in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return plain(value)
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _short(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k}={v}" for k, v in value.items())
    if isinstance(value, tuple) and all(isinstance(c, Condition) for c in value):
        return ", ".join(map(_named, value)) or "none"
    return str(value)


def _named(condition: Condition) -> str:
    """Returns a condition in words: `y (10 classes)`."""
    if condition.classes is None:
        return f"{condition.name} {condition.shape}"
    return f"{condition.name} ({condition.classes} classes)"
