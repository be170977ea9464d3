"""Faults in the noise: what was added is not what (seed, image, step) draws."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ddpm_deploy.arrays import Samples
from ddpm_deploy.noise import SeededNoise
from ddpm_deploy.verify.cause import Cause
from ddpm_deploy.verify.compare import Pair
from ddpm_deploy.verify.suspects.evidence import Evidence

SAME = 1e-3
"""Noise taken back out of x_s is off by x's rounding over σ."""


def noise_causes(evidence: Evidence) -> Iterator[Cause]:
    """Yields what explains that x_T, or the noise of the steps, differs."""
    found = list(_drawn(evidence))
    if len(found) > 1 and _equal(found[-1][1], found[-2][1]) and not _zero(found[-1][1]):
        yield _cause(
            "noise-of-another-step",
            "The deployed loop adds the same noise in every step.",
            f"{found[-2][0]} and {found[-1][0]} have the same",
        )
        return
    for what, given, wanted, step in found:
        cause = _named(evidence, what, given, wanted, step)
        if cause is not None:
            yield cause
            return


def _drawn(evidence: Evidence) -> Iterator[tuple[str, Samples, Samples, int]]:
    """Yields draws that differ: where, what was drawn, what should have been, the step's number."""
    first = next((p for p in evidence.pairs if p.k == 1), None)
    if first is not None and not np.array_equal(first.given.x_t, first.wanted.x_t):
        yield "x_T", first.given.x_t, evidence.noise(0), 0
    for pair in evidence.pairs:
        drawn = _taken_out(evidence, pair)
        if drawn is None:
            continue
        wanted = evidence.noise(pair.k)
        if np.abs(drawn - wanted).max() > 0.01 + SAME / evidence.row(pair).x_from_noise:
            yield f"the step at t = {pair.wanted.t}", drawn, wanted, pair.k


def _taken_out(evidence: Evidence, pair: Pair) -> Samples | None:
    """Returns the noise that a deployed step added, as the reference's row would have it."""
    row = evidence.row(pair)
    if row.log_std is not None or row.x_from_noise < 1e-3:
        return None
    plain = evidence.result(pair, row, noise=False)
    if plain is None:
        return None
    return np.asarray((pair.local_given.x - plain) / row.x_from_noise, np.float32)


def _named(
    evidence: Evidence, what: str, given: Samples, wanted: Samples, step: int
) -> Cause | None:
    return (
        _of_the_batch(what, given, wanted)
        or _elsewhere(evidence, what, given, wanted, step)
        or _unknown(evidence, what, given, wanted)
    )


def _of_the_batch(what: str, given: Samples, wanted: Samples) -> Cause | None:
    if _zero(given):
        return _cause("no-noise", f"There is no noise in {what} of the deployed loop.", "it is 0")
    if len(given) > 1 and _equal(given, given[:1]):
        return _cause(
            "noise-shared-by-images",
            f"All images of the deployed loop get the same noise in {what}.",
            f"images 0 and 1 differ by {np.abs(given[0] - given[1]).max():.1e} there",
        )
    others = [_likeness(g, w) for g, w in zip(given[1:], wanted[1:], strict=True)]
    if _equal(given[:1], wanted[:1]) and max(others, default=1.0) < 0.5:
        return _cause(
            "noise-per-batch",
            "The deployed loop draws its noise for the batch, not for each image.",
            f"in {what} image 0 alone of the {len(given)} gets its own noise",
        )
    return None


def _elsewhere(
    evidence: Evidence, what: str, given: Samples, wanted: Samples, step: int
) -> Cause | None:
    """Finds the draw at another step, image or seed."""
    count = len(evidence.table)
    for other in (step - 1, step + 1, 0, 1, count - step, count + 1 - step):
        if other >= 0 and other != step and _equal(given, evidence.noise(other)):
            near = abs(other - step) == 1
            return _cause(
                "noise-off-by-one-step" if near else "noise-of-another-step",
                f"The deployed loop adds the noise of step k{other - step:+d} in step k."
                if near
                else f"The deployed loop adds the noise of step {other} in step {step}.",
                f"so it is in {what}",
            )
    for i, j in [(i, j) for i in range(len(given)) for j in range(len(wanted)) if i != j]:
        if _equal(given[i], wanted[j]):
            return _cause(
                "noise-of-another-image",
                "The deployed loop gives images the noise of others.",
                f"in {what} image {evidence.images[i]} gets that of image {evidence.images[j]}",
            )
    seed = _other_seed(evidence, given, step)
    if seed is None:
        return None
    return _cause(
        "other-noise-seed",
        f"The deployed loop draws its noise with seed {seed}.",
        f"{what} is the draw of that seed, not of seed {evidence.recipe.seed}",
    )


def _unknown(evidence: Evidence, what: str, given: Samples, wanted: Samples) -> Cause | None:
    scale = float(np.vdot(given, wanted) / np.vdot(wanted, wanted))
    if abs(scale - 1) > 1e-3 and _equal(given, np.float32(scale) * wanted):
        return _cause(
            "noise-scale",
            f"The deployed loop scales its noise by {scale:.6g}.",
            f"so it is in {what}",
        )
    likeness = _likeness(given, wanted)
    if what == "x_T" and likeness > 0.5:  # no step's arithmetic is in it
        others = [
            image
            for image, g, w in zip(evidence.images, given, wanted, strict=True)
            if not np.array_equal(g, w)
        ]
        return _cause(
            "other-noise",
            "The deployed loop changes its noise.",
            f"in {what} the noise of image {', '.join(map(str, others))} is like what seed "
            f"{evidence.recipe.seed} draws (correlation {likeness:.4f}), but differs by up to "
            f"{np.abs(given - wanted).max():.1e}",
            certain=False,
        )
    if likeness > 0.5 or not 0.8 < float(given.std()) < 1.25:
        return None
    return _cause(
        "other-noise",
        "The deployed loop draws its noise in another way.",
        f"in {what} it is standard normal (σ = {given.std():.2f}), and has little to do with "
        f"what seed {evidence.recipe.seed} draws (correlation {likeness:.2f})",
        certain=False,
    )


def _cause(name: str, says: str, evidence: str, *, certain: bool = True) -> Cause:
    return Cause(
        name=name,
        place="noise",
        says=says,
        evidence=(evidence,),
        mend="Draw each image's noise by (seed, image, step): SeededNoise(seed, images, shape)(k).",
        certain=certain,
    )


def _equal(given: Samples, wanted: Samples) -> bool:
    return bool(np.abs(given - wanted).max() < 0.01)


def _zero(given: Samples) -> bool:
    return bool(np.abs(given).max() < 0.01)


def _likeness(given: Samples, wanted: Samples) -> float:
    """Returns the correlation, without its sign; 0 where one of them is constant."""
    both = float(given.std()) * float(wanted.std())
    return abs(float(np.corrcoef(given.ravel(), wanted.ravel())[0, 1])) if both else 0.0


def _other_seed(evidence: Evidence, given: Samples, step: int) -> int | None:
    """Looks for the draw among small seeds."""
    shape = evidence.spec.sample_shape
    for seed in range(10):
        if seed != evidence.recipe.seed:
            drawn = SeededNoise(seed, list(evidence.images)[:1], shape)(step)
            if _equal(given[:1], drawn):
                return seed
    return None
