"""What a comparison found, in words and figures for people."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddpm_deploy.verify.budget import Quantity
from ddpm_deploy.verify.verification import Verification

QUANTITY_NAMES: Mapping[Quantity, str] = {"out": "network output", "x0": "x_0", "x": "x"}


def number(value: float | None) -> str:
    """Returns two digits of a number: 2e-05, 0.31."""
    if value is None:
        return "–"
    return f"{value:.2g}" if math.isfinite(value) else "∞"


def decibels(value: float) -> str:
    """Returns a PSNR; where it is infinite, all values are equal."""
    return "identical" if value == math.inf else f"{value:.1f} dB"


def verdict(found: Verification) -> str:
    """Returns what came out, in a few words."""
    if found.comparison.not_finite is not None:
        return "Not the same model: its numbers are not finite"
    return "The same model" if found.passed else "Not the same model"


def side(described: Mapping[str, Any]) -> str:
    """Returns what to call a side: its runtime and the file's name."""
    path, name = described.get("path"), str(described.get("name", ""))
    return f"{Path(str(path)).name} ({name})" if path else name


def amplification(found: Verification) -> str:
    """Says what the loop makes of one step's error."""
    comparison, factor = found.comparison, found.comparison.amplification
    if not comparison.steps:
        return "No step could be compared, so nothing is known of how the loop treats an error."
    local = max(step.local.x.max for step in comparison.steps)
    free = comparison.worst_accumulated.accumulated.x.max
    if factor is None:
        return (
            "On the reference's own x_t no step differs, so there is nothing for the loop to "
            "make larger."
            if free == 0
            else f"On the reference's own x_t no step differs, yet running free x differs by "
            f"{number(free)}: the two loops are fed differently."
        )
    measured = (
        f"one step alone is off by {number(local)} at most, the whole loop by {number(free)} "
        "of x's peak"
    )
    if factor > 1.5:
        return f"The loop makes a step's error {factor:.3g} times as large: {measured}."
    if factor < 1 / 1.5:
        return f"The loop forgets what a step does wrong (factor {factor:.2g}): {measured}."
    return f"The loop hands a step's error on nearly as it is (factor {factor:.2g}): {measured}."


def origin(found: Verification) -> str:
    """Says whether both sides come from one checkpoint."""
    match found.same_checkpoint:
        case True:
            return "Both sides come from the same checkpoint file."
        case False:
            return "The two sides come from different checkpoint files: their hashes differ."
        case _:
            return "At least one side does not say which checkpoint file it comes from."


def command(typed: Sequence[str]) -> str:
    """Returns what to type to do it again; empty where nothing was typed."""
    if not typed:
        return ""
    program, *rest = typed
    # Where the program lies is this machine's affair.
    program = "python -m ddpm_deploy" if program.endswith(".py") else Path(program).name
    return f"{program} {shlex.join(rest)}"
