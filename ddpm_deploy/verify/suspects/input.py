"""Faults in what the network is fed, or in how its output is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np

from ddpm_deploy.arrays import Samples
from ddpm_deploy.engines.base import Engine
from ddpm_deploy.errors import DDPMDeployError
from ddpm_deploy.parity import relative_error
from ddpm_deploy.precision import to_bf16, to_fp16
from ddpm_deploy.verify.cause import Cause
from ddpm_deploy.verify.compare import Pair
from ddpm_deploy.verify.suspects.evidence import Change, Evidence, Experiment

CLASSES = 20
"""Classes that a swapped label is looked for among."""

NEAR = 16
"""How far off a timestep is looked for."""


@dataclass(frozen=True, kw_only=True)
class Suspect:
    """A fault that can be planted on a network.

    Attributes:
        name: As in `Cause`.
        says: What it is, a sentence.
        mend: What to do.
        x: What it does to the input.
        t: What it does to the timestep.
        out: What it does to the output.
    """

    name: str
    says: str
    mend: str
    x: Change | None = None
    t: Callable[[int], int] | None = None
    out: Change | None = None


def input_causes(evidence: Evidence) -> Iterator[Cause]:
    """Yields what explains that the network's output differs."""
    experiment = evidence.experiment
    if experiment is None or not evidence.network_is_off:
        return
    found: list[tuple[float, Cause]] = []
    for suspect in (*_timesteps(experiment), *_changes(experiment), *_halves(experiment)):
        left = experiment.error(x=suspect.x, t=suspect.t, out=suspect.out)
        if experiment.explains(left):
            found.append((left, _cause(experiment, suspect, left)))
    if not found:
        found += [(0.0, cause) for cause in _of_labels(evidence, experiment)]
    if not found:
        found += [(0.0, cause) for cause in _of_output(evidence)]
    if not found:
        found += [(0.0, cause) for cause in _nearby(experiment)]
    for _, cause in sorted(found, key=lambda pair: pair[0])[:1]:
        yield cause


def _cause(experiment: Experiment, suspect: Suspect, left: float) -> Cause:
    base = experiment.base()
    asked = "the deployed network, with that undone," if experiment.inverse else "the reference"
    rest = "gives the reference's output" if experiment.inverse else "so fed gives that output"
    return Cause(
        name=suspect.name,
        place="input",
        says=suspect.says,
        evidence=(
            f"the output is off by {base:.1e} of its peak; {asked} {rest}, but for {left:.1e}",
        ),
        mend=suspect.mend,
        certain=experiment.gone(left),
    )


def _timesteps(experiment: Experiment) -> Iterator[Suspect]:
    T = experiment.spec.schedule.T  # noqa: N806
    sign = -1 if experiment.inverse else 1
    mend = "Feed t from 0 (least noise) to T-1, int64, as the table has it."
    for shift in (1, -1, 2, -2):
        yield Suspect(
            name="timestep-off-by-one" if abs(shift) == 1 else "timestep-shifted",
            says=f"The deployed network is fed t{shift:+d} in place of t.",
            mend=mend,
            t=lambda t, by=sign * shift: t + by,  # type: ignore[misc]
        )
    yield Suspect(
        name="timestep-reversed",
        says="The deployed network is fed T-1-t in place of t.",
        mend=mend,
        t=lambda t: T - 1 - t,
    )
    if experiment.inverse:
        return  # what rounds or rescales t cannot be undone
    for scale in {1000 / T, T / 1000} - {1.0}:
        yield Suspect(
            name="timestep-rescaled",
            says=f"The deployed network is fed {scale:g}·t in place of t.",
            mend="Rescale t once: the graph does it itself where its family needs it.",
            t=lambda t, by=scale: round(t * by),  # type: ignore[misc]
        )
    yield Suspect(
        name="half-precision-timestep",
        says="The deployed network is fed t rounded to bf16, which has whole numbers to 256 alone.",
        mend="Keep t an int64, or float32, up to the embedding.",
        t=_bf16,
    )
    for constant in sorted(
        {0, 1, T // 2, T - 1, *(experiment.timestep(p) for p in experiment.pairs)}
    ):
        yield Suspect(
            name="timestep-constant",
            says=f"The deployed network does not follow t: it is fed t = {constant} at every step.",
            mend="Export the network with t as an input; a Python number is traced as a constant.",
            t=lambda _, at=constant: at,  # type: ignore[misc]
        )


def _nearby(experiment: Experiment) -> Iterator[Cause]:
    """Looks for the timestep that the deployed network was fed, near the right one."""
    if experiment.inverse:
        return
    found = []
    for pair in experiment.pairs[:2]:
        t = experiment.timestep(pair)
        near = range(max(0, t - NEAR), min(experiment.spec.schedule.T, t + NEAR + 1))
        errors = {
            other: relative_error(experiment.call(pair, other), experiment.target(pair))
            for other in near
        }
        best = min(errors, key=lambda other: errors[other])
        if best == t or not experiment.explains(errors[best]):
            return
        found.append((t, best, errors[best]))
    words = ", ".join(f"{best} in place of {t}" for t, best, _ in found)
    yield Cause(
        name="other-timesteps",
        place="input",
        says="The deployed network is fed other timesteps.",
        evidence=(
            f"t = {words}; so fed, the reference gives its outputs but for "
            f"{max(left for *_, left in found):.1e} of the peak",
        ),
        mend="Feed each step's own t, as the table has it.",
        certain=experiment.gone(max(left for *_, left in found)),
    )


def _bf16(t: int) -> int:
    return int(to_bf16(np.array([t], np.float32))[0])


def _changes(experiment: Experiment) -> Iterator[Suspect]:
    shape = experiment.spec.sample_shape
    low, high = experiment.spec.value_range
    yield from _orders(shape)
    if len(shape) == 3 and shape[1] == shape[2]:
        yield from _pictured(
            "transposed-image", "with height and width exchanged", lambda x: x.swapaxes(-1, -2)
        )
    if len(shape) == 3:
        yield from _pictured("flipped-image", "upside down", lambda x: x[..., ::-1, :])
        yield from _pictured("flipped-image", "mirrored", lambda x: x[..., ::-1])
        yield Suspect(
            name="memory-layout",
            says="The deployed network reads x as (N, H, W, C), or is fed it so.",
            mend="Feed x as (N, C, H, W), contiguous.",
            x=_rows_first if experiment.inverse else _channels_last,
        )
    forward, back = (lambda x: (x - low) / (high - low), lambda x: x * (high - low) + low)
    ranges = {
        f"[0, 1] in place of [{low:g}, {high:g}]": back if experiment.inverse else forward,
        f"[{low:g}, {high:g}], scaled to that a second time": forward
        if experiment.inverse
        else back,
        "[0, 255] divided by 127.5 once more": (lambda x: x * 127.5)
        if experiment.inverse
        else (lambda x: x / 127.5),
    }
    for words, change in ranges.items():
        yield Suspect(
            name="wrong-value-range",
            says=f"The deployed network is fed x in {words}.",
            mend=f"Feed x_t itself: data were in [{low:g}, {high:g}] in training.",
            x=change,
        )


def _channels_last(x: Samples) -> Samples:
    """Returns what is read where (N, C, H, W) is taken for (N, H, W, C)."""
    return x.transpose(0, 2, 3, 1).reshape(x.shape)


def _rows_first(x: Samples) -> Samples:
    """Undoes `_channels_last`."""
    count, channels, height, width = x.shape
    return x.reshape(count, height, width, channels).transpose(0, 3, 1, 2)


def _halves(experiment: Experiment) -> Iterator[Suspect]:
    """The network is fed, or gives, numbers of half precision."""
    if experiment.inverse:
        return  # what rounds cannot be undone
    for name, to in (("fp16", to_fp16), ("bf16", to_bf16)):
        mend = "Keep x_t and the network's inputs and outputs in float32."
        yield Suspect(
            name="half-precision-input",
            says=f"The deployed network is fed x rounded to {name}.",
            mend=mend,
            x=to,
        )
        yield Suspect(
            name="half-precision-output",
            says=f"The deployed network's output is rounded to {name}.",
            mend=mend,
            out=to,
        )


def _orders(shape: tuple[int, ...]) -> Iterator[Suspect]:
    channels = shape[0]
    if not 2 <= channels <= 4:
        return
    for order in permutations(range(channels)):
        if order == tuple(range(channels)):
            continue
        # The inverse of an order is another one of the list.
        there = list(order)
        back = list(np.argsort(order))
        words = ", ".join(map(str, order))

        def put(x: Samples, order: list[int] = there) -> Samples:
            return x[:, order]

        def undo(x: Samples, order: list[int] = back) -> Samples:
            return x[:, order]

        mend = "Keep the channels as in training: RGB, or as the data came."
        yield Suspect(
            name="channel-order",
            says=f"The deployed network has its channels in the order {words}, in and out.",
            mend=mend,
            x=put,
            out=undo,
        )
        yield Suspect(
            name="channel-order",
            says=f"The deployed network is fed its channels in the order {words}.",
            mend=mend,
            x=put,
        )
        yield Suspect(
            name="channel-order",
            says=f"The deployed network gives its channels in the order {words}.",
            mend=mend,
            out=undo,
        )


def _pictured(name: str, words: str, change: Change) -> Iterator[Suspect]:
    mend = "Feed and read (N, C, H, W), row by row from the top."
    both = f"The deployed network is fed its images {words}"
    yield Suspect(name=name, says=f"{both}, and gives them so.", mend=mend, x=change, out=change)
    yield Suspect(name=name, says=f"{both}.", mend=mend, x=change)
    yield Suspect(
        name=name, says=f"The deployed network gives its images {words}.", mend=mend, out=change
    )


def _of_labels(evidence: Evidence, experiment: Experiment) -> Iterator[Cause]:
    engine = experiment.engine
    if engine is None or engine.spec.label is None:
        return
    try:
        yield from _guidances(evidence, experiment, engine)
        yield from _swapped(evidence, experiment, engine)
    except DDPMDeployError:  # a network that does not take such labels has no such fault
        return


def _guidances(evidence: Evidence, experiment: Experiment, engine: Engine) -> Iterator[Cause]:
    """Finds s in out = u + s (c - u) by least squares, and names it where that is all."""
    label = engine.spec.label
    if label is None or label.null is None or experiment.inverse:
        return
    plainly = replace(evidence.recipe, guidance=1.0)
    conditional = plainly.predictor(engine, evidence.images)
    unconditional = replace(plainly, labels=(label.null,)).predictor(engine, evidence.images)
    scales, calls = [], []
    for pair in experiment.pairs:
        t = experiment.timestep(pair)
        wanted = experiment.call(pair, t, predict=conditional)
        plain = experiment.call(pair, t, predict=unconditional)
        target, span = experiment.target(pair), wanted - plain
        if not np.any(span):
            return
        scales.append(float(np.vdot(target - plain, span) / np.vdot(span, span)))
        calls.append((plain, span, target))
    scale = float(np.median(scales))
    left = max(relative_error(u + np.float32(scale) * span, out) for u, span, out in calls)
    said = evidence.recipe.guidance
    if abs(scale - said) < 1e-3 or not experiment.explains(left):
        return
    name = "label-ignored" if abs(scale) < 1e-3 else "wrong-guidance"
    yield Cause(
        name=name,
        place="input",
        says="The deployed network is fed no label: its output is the unconditional one."
        if name == "label-ignored"
        else f"The deployed loop has guidance {scale:.3g}; the reference has {said:g}.",
        evidence=(
            f"u + s (c - u) with s = {scale:.3g} is its output, but for {left:.1e} of the "
            f"peak; with s = {said:g} it is off by {experiment.base():.1e}",
        ),
        mend="Feed each image's label in every step."
        if name == "label-ignored"
        else f"Set the guidance to {said:g}.",
        certain=experiment.gone(left),
    )


def _swapped(evidence: Evidence, experiment: Experiment, engine: Engine) -> Iterator[Cause]:
    """Feeds every image each label, and names those that give the deployed outputs."""
    label = engine.spec.label
    if label is None or (label.classes or 0) > CLASSES:
        return
    y = evidence.recipe.conditions(engine, evidence.images)[label.name]
    every = [*range(label.classes or 1), *([] if label.null is None else [label.null])]
    best = np.full(len(y), np.inf)
    found = y.copy()
    for number in every:
        errors = np.zeros(len(y))
        predict = replace(evidence.recipe, labels=(number,)).predictor(engine, evidence.images)
        for pair in experiment.pairs[:2]:
            given = experiment.call(pair, experiment.timestep(pair), predict=predict)
            target = experiment.target(pair)
            each = [relative_error(g, w) for g, w in zip(given, target, strict=True)]
            errors = np.maximum(errors, each)
        found = np.where(errors < best, number, found)
        best = np.minimum(best, errors)
    if np.array_equal(found, y) or not experiment.explains(float(best.max())):
        return
    changed = ", ".join(
        f"image {evidence.images[i]} {found[i]} for {y[i]}"
        for i in range(len(y))
        if found[i] != y[i]
    )
    yield Cause(
        name="swapped-label",
        place="input",
        says="The deployed network is fed other labels.",
        evidence=(
            f"{'to be undone: ' if experiment.inverse else ''}{changed}: so its outputs are the "
            f"reference's, but for {best.max():.1e} of the peak",
        ),
        mend="Image i gets labels[i mod their number]; count classes from 0, as in training.",
        certain=experiment.gone(float(best.max())),
    )


def _of_output(evidence: Evidence) -> Iterator[Cause]:
    """Writes the deployed output as c·out + d·x_t, and names what c and d are."""
    pairs = evidence.worst[:3]
    fits = [_fit(pair) for pair in pairs]
    base = max(evidence.network_errors[p.k] for p in pairs)
    allowed = max((evidence.allowed(pair) for pair in pairs), default=0.0)
    if not fits or max(left for *_, left in fits) > evidence.left_by_a_fault(base, allowed):
        return
    left = max(left for *_, left in fits)
    words = "; ".join(
        f"{c:.4g}·out {d:+.4g}·x at t = {p.local_wanted.t}"
        for p, (c, d, _) in zip(pairs, fits, strict=True)
    )
    says = f"it is {words}, but for {left:.1e} of the peak"
    if other := _prediction(evidence, pairs):
        yield Cause(
            name="wrong-prediction",
            place="network",
            says=f"The deployed network gives {other}; the reference gives "
            f"{evidence.spec.prediction}.",
            evidence=(says,),
            mend=f"Export the network's {evidence.spec.prediction}, or set the prediction.",
            certain=evidence.gone(left, base, allowed),
        )
    elif all(max(abs(d), abs(c - fits[0][0])) < 0.01 * abs(c) for c, d, _ in fits):
        sign = all(abs(c + 1) < 0.01 for c, _, _ in fits)
        yield Cause(
            name="output-sign" if sign else "output-scale",
            place="network",
            says="The deployed network's output has the opposite sign."
            if sign
            else f"The deployed network's output is {fits[0][0]:.6g} times the reference's.",
            evidence=(says,),
            mend="Look at what stands behind the last layer.",
            certain=evidence.gone(left, base, allowed),
        )


def _fit(pair: Pair) -> tuple[float, float, float]:
    """Returns c, d and the error left of given = c·out + d·x_t."""
    out, x_t = pair.local_wanted.out, pair.local_wanted.x_t
    given = pair.local_given.out
    basis = np.stack([out.ravel(), x_t.ravel()], axis=1).astype(np.float64)
    (c, d), *_ = np.linalg.lstsq(basis, given.ravel().astype(np.float64), rcond=None)
    fitted = (basis @ [c, d]).reshape(given.shape)
    return float(c), float(d), relative_error(np.asarray(fitted, np.float32), given)


def _prediction(evidence: Evidence, pairs: list[Pair]) -> str | None:
    """Returns the prediction that the deployed output is, as an ε has them in closed form."""
    if evidence.spec.prediction != "epsilon":
        return None
    for name in ("sample", "v_prediction"):
        if all(_is_prediction(evidence, name, pair) for pair in pairs):
            return name
    return None


def _is_prediction(evidence: Evidence, name: str, pair: Pair) -> bool:
    a_bar = evidence.spec.schedule.alpha_bar_at(pair.local_wanted.t)
    a, s = np.sqrt(a_bar), np.sqrt(1 - a_bar)
    out, x_t = pair.local_wanted.out, pair.local_wanted.x_t
    # x_0 = (x - s ε) / a, and v = a ε - s x_0.
    other = (x_t - s * out) / a if name == "sample" else (out - s * x_t) / a
    left = relative_error(np.asarray(other, np.float32), pair.local_given.out)
    error = evidence.network_errors[pair.k]
    return left <= evidence.left_by_a_fault(error, evidence.allowed(pair))
