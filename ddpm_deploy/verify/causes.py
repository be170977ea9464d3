"""Why a deployed loop is not the trained model: the likely causes, with their evidence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ddpm_deploy.arrays import Pixels
from ddpm_deploy.verify.cause import Cause
from ddpm_deploy.verify.suspects.evidence import Evidence
from ddpm_deploy.verify.suspects.file import file_causes
from ddpm_deploy.verify.suspects.input import input_causes
from ddpm_deploy.verify.suspects.network import network_causes
from ddpm_deploy.verify.suspects.noise import noise_causes
from ddpm_deploy.verify.suspects.pictures import picture_causes
from ddpm_deploy.verify.suspects.sampler import sampler_causes

VAGUE = ("network", "reduced-precision")
"""Causes that say no more than that something differs."""


def find_causes(evidence: Evidence, pixels: tuple[Pixels, Pixels] | None) -> tuple[Cause, ...]:
    """Returns what explains that a deployed loop differs, the likeliest first.

    It may call the networks some hundred times, on a few of the compared x_t.

    Args:
        evidence: A comparison that failed.
        pixels: The last pictures of the reference and of the deployed side.
    """
    return merged(_all(evidence, pixels))


def _all(evidence: Evidence, pixels: tuple[Pixels, Pixels] | None) -> Iterator[Cause]:
    yield from file_causes(evidence)
    sampler = list(sampler_causes(evidence))
    yield from sampler
    if not sampler:
        yield from noise_causes(evidence)
    # At other timesteps a network gives another output, and rightly so.
    if "other-timesteps" not in {cause.name for cause in sampler}:
        inputs = list(input_causes(evidence))
        yield from inputs
        if not inputs:
            yield from network_causes(evidence)
    yield from picture_causes(evidence, pixels)


def merged(causes: Iterable[Cause]) -> tuple[Cause, ...]:
    """Returns causes found by several means, each once, the certain ones first."""
    found: dict[str, Cause] = {}
    for cause in causes:
        found.setdefault(cause.name, cause)
    inside = [c for c in found.values() if c.certain and c.place in {"network", "precision"}]
    if inside:  # it is known where, so it need not be said that it is somewhere
        for vague in VAGUE:
            found.pop(vague, None)
    return tuple(sorted(found.values(), key=lambda cause: not cause.certain))
