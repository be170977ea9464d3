"""What was done to a weight: the one change that makes it, exactly, out of another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

import numpy as np

from ddpm_deploy.arrays import Array
from ddpm_deploy.precision import to_bf16, to_fp16, to_tf32

_ULPS = 5e-7
"""Below this share of the peak two float32 weights are one: a constant was folded elsewhere."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """How one weight comes from another.

    Attributes:
        kind: `weights-rounded`, `weight-zero`, `weight-scaled`, `blocks-exchanged`,
            `weight-transposed`, `weight-flipped`, `channels-permuted`, `weight-truncated`,
            `weight-shape` or `weight-changed`.
        says: What it is, as the end of a sentence, with its values.
        evidence: The values.
    """

    kind: str
    says: str
    evidence: dict[str, Any] = field(default_factory=dict)


def change(reference: Array, engine: Array) -> Change | None:
    """Returns what makes the engine's weight out of the reference's; None where they are one.

    Axes of length 1 are no difference. A weight that is stored in half precision is compared with
    the reference's, rounded alike.
    """
    wanted, given = np.squeeze(reference), np.squeeze(engine)
    low = _low_type(given)
    with np.errstate(over="ignore"):  # what half precision does not reach is infinite in it
        base = _as_float32(wanted if low is None else wanted.astype(given.dtype))
    given = _as_float32(given)
    if given.shape == base.shape and _same(base, given):
        return None if low is None else _rounded(low)
    if given.shape == base.shape and low is None:
        for name, grid in _GRIDS.items():
            if np.array_equal(grid(base), given):
                return _rounded(name)
        if _on_int8_grid(base, given):
            return _rounded("int8")
    return next(found for find in _FINDERS if (found := find(base, given)) is not None)


def distance(reference: Array, engine: Array) -> float:
    """Returns |engine - reference| / |reference|, Euclidean; infinite where the shapes differ."""
    wanted, given = (np.squeeze(a).astype(np.float64) for a in (reference, engine))
    if wanted.shape != given.shape:
        return float("inf")
    return float(np.linalg.norm(given - wanted) / (np.linalg.norm(wanted) or 1.0))


def _rounded(name: str) -> Change:
    return Change(
        kind="weights-rounded",
        says=f"is the reference's, rounded to {name}",
        evidence={"type": name},
    )


def _low_type(array: Array) -> str | None:
    return {"float16": "fp16", "bfloat16": "bf16"}.get(array.dtype.name)


def _as_float32(array: Array) -> Array:
    return np.asarray(array, dtype=np.float32)


def _same(wanted: Array, given: Array) -> bool:
    return np.array_equal(wanted, given) or bool(
        np.abs(given - wanted).max(initial=0) <= _ULPS * np.abs(wanted).max(initial=0)
    )


_GRIDS: dict[str, Callable[[Array], Array]] = {"bf16": to_bf16, "fp16": to_fp16, "tf32": to_tf32}


def _on_int8_grid(wanted: Array, given: Array) -> bool:
    """Says whether these are multiples of a step, 127 to the peak: of all, or of a channel."""
    if wanted.size < 3 or not wanted.any():
        return False
    for axis in (None, *range(wanted.ndim)):
        others = None if axis is None else tuple(i for i in range(wanted.ndim) if i != axis)
        step = np.abs(wanted).max(axis=others, keepdims=True, initial=0) / 127
        step = np.where(step == 0, 1, step).astype(np.float64)
        if np.abs(np.rint(wanted / step) * step - given).max() < step.min() / 50:
            return True
    return False


def _shape(wanted: Array, given: Array) -> Change | None:
    if wanted.shape == given.shape or sorted(wanted.shape) == sorted(given.shape):
        return None
    return Change(kind="weight-shape", says=f"is {given.shape}; the reference's is {wanted.shape}")


def _zero(wanted: Array, given: Array) -> Change | None:
    if given.any():
        return None
    return Change(
        kind="weight-zero", says=f"is zero; the reference's reaches {np.abs(wanted).max():.3g}"
    )


def _scaled(wanted: Array, given: Array) -> Change | None:
    if wanted.shape != given.shape or wanted.size < 2 or not np.isfinite(given).all():
        return None
    w, g = wanted.astype(np.float64), given.astype(np.float64)
    factor = float((w * g).sum() / ((w * w).sum() or 1.0))
    if np.abs(g - factor * w).max() > 1e-6 * np.abs(g).max():
        return None
    return Change(
        kind="weight-scaled",
        says=f"is {factor:.6g} times the reference's",
        evidence={"factor": factor},
    )


def _blocks(wanted: Array, given: Array) -> Change | None:
    """Finds q, k and v in another order where one weight projects to all three."""
    if wanted.shape != given.shape or wanted.ndim > 2:
        return None
    for axis, size in enumerate(wanted.shape):
        # Three numbers are the biases of red, green and blue.
        if size % 3 or size == 3 or (wanted.ndim == 2 and size != 3 * wanted.shape[1 - axis]):
            continue
        parts = np.split(wanted, 3, axis)
        for order in list(permutations(range(3)))[1:]:
            if _same(np.concatenate([parts[i] for i in order], axis), given):
                names = ", ".join("qkv"[i] for i in order)
                return Change(
                    kind="blocks-exchanged",
                    says=f"holds the reference's q, k, v in the order {names}",
                    evidence={"order": order},
                )
    return None


def _transposed(wanted: Array, given: Array) -> Change | None:
    for axes in list(permutations(range(wanted.ndim)))[1:] if wanted.ndim <= 5 else ():
        moved = wanted.transpose(axes)
        if moved.shape == given.shape and _same(moved, given):
            return Change(
                kind="weight-transposed",
                says=f"is the reference's with its axes in the order {axes}",
                evidence={"axes": axes},
            )
    return None


def _flipped(wanted: Array, given: Array) -> Change | None:
    if wanted.shape != given.shape or wanted.ndim < 3:
        return None
    spatial = range(2, wanted.ndim) if wanted.ndim > 3 else range(1, wanted.ndim)
    for axes in [tuple(spatial), *((axis,) for axis in spatial)]:
        if _same(np.flip(wanted, axes), given):
            return Change(
                kind="weight-flipped",
                says=f"is the reference's, reversed along the axes {axes}",
                evidence={"axes": axes},
            )
    return None


def _permuted(wanted: Array, given: Array) -> Change | None:
    if wanted.shape != given.shape:
        return None
    for axis in range(min(wanted.ndim, 2)):
        order = _order(np.moveaxis(wanted, axis, 0), np.moveaxis(given, axis, 0))
        if order is not None:
            side = "output" if axis == 0 else "input"
            shown = ", ".join(map(str, order[:8])) + (", …" if len(order) > 8 else "")
            return Change(
                kind="channels-permuted",
                says=f"has the reference's {side} channels in the order {shown}",
                evidence={"axis": axis, "order": order},
            )
    return None


def _order(wanted: Array, given: Array) -> list[int] | None:
    """Returns which row of one array each row of the other is; None where one is no such row."""
    places: dict[bytes, int] = {row.tobytes(): i for i, row in enumerate(wanted)}
    order = [places.get(row.tobytes(), -1) for row in given]
    return None if len(wanted) < 2 or sorted(order) != list(range(len(wanted))) else order


def _truncated(wanted: Array, given: Array) -> Change | None:
    if wanted.shape != given.shape:
        return None
    w, g = wanted.ravel(), given.ravel()
    head = int(np.argmax(w != g))
    zero = not g[head:].any()
    if head < max(1, len(w) // 20) or not (zero or np.mean(w[head:] != g[head:]) > 0.9):
        return None
    if len(w) - head < 2:
        return None
    return Change(
        kind="weight-truncated",
        says=f"is the reference's for its first {head} of {len(w)} numbers, then "
        + ("zero" if zero else "something else"),
        evidence={"equal": head, "numbers": len(w), "tail_is_zero": zero},
    )


def _changed(wanted: Array, given: Array) -> Change:
    if wanted.shape != given.shape:
        return Change(
            kind="weight-shape", says=f"is {given.shape}; the reference's is {wanted.shape}"
        )
    share = float(np.mean(wanted != given))
    far = distance(wanted, given)
    return Change(
        kind="weight-changed",
        says=f"differs in {share:.0%} of its numbers, by {far:.2g} of its length",
        evidence={"share": share, "distance": far},
    )


_FINDERS: tuple[Callable[[Array, Array], Change | None], ...] = (
    _shape,
    _zero,
    _scaled,
    _blocks,
    _transposed,
    _flipped,
    _permuted,
    _truncated,
    _changed,  # always finds something
)
