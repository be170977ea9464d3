"""What a deployed loop may differ by: limits per quantity and range of timesteps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from ddpm_deploy.errors import BudgetError
from ddpm_deploy.parity import BUDGETS, TOLERANCE
from ddpm_deploy.verify.measures import LARGER_IS_BETTER, Measure

if TYPE_CHECKING:
    from ddpm_deploy.schedule import Schedule
    from ddpm_deploy.verify.compare import StepErrors

ErrorKind = Literal["local", "accumulated"]
Quantity = Literal["out", "x0", "x"]
Arithmetic = Literal["fp32", "tf32", "fp16", "bf16", "int8"]

ARITHMETICS: tuple[Arithmetic, ...] = get_args(Arithmetic)

QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)

UNIT_ROUNDOFF: Mapping[Arithmetic, float] = {
    "fp32": 2.0**-24,
    "tf32": 2.0**-11,
    "fp16": 2.0**-11,
    "bf16": 2.0**-8,
    "int8": 1 / 254,
}
"""Largest relative error of rounding one number; for int8 half a step of 127 in its range."""

PICTURES: Mapping[str, tuple[float, float]] = {
    "pixels": (0.0, 1.0),
    "equal": (0.0, 1.0),
    "bias": (0.0, 255.0),
    "psnr": (-math.inf, math.inf),
    "ssim": (-1.0, 1.0),
}
"""What a budget says of the last pictures, and the least and the largest that each can be."""

FORMAT = 1
"""Version of a budget file. A reader refuses a later one."""


@dataclass(frozen=True, kw_only=True)
class Limit:
    """What one measure of one error may be, over a range of timesteps.

    Attributes:
        error: `local` or `accumulated`.
        quantity: `out` of the network, `x0`, or `x`, the result of the step.
        measure: `max`, `l2`, `cosine` or `psnr`, see `Errors`.
        bound: The largest value allowed; the least for `cosine` and `psnr`.
        first: Least timestep that it holds for.
        last: Largest timestep that it holds for; None for all above.
        general: Whether it is for networks and loops at large, see `Budget.over`.
    """

    error: ErrorKind
    quantity: Quantity
    measure: Measure = "max"
    bound: float
    first: int = 0
    last: int | None = None
    general: bool = field(default=False, compare=False)

    @property
    def name(self) -> str:
        """Which number it bounds: `local/out/max`, with its range of t where it has one."""
        name = f"{self.error}/{self.quantity}/{self.measure}"
        if self.first or self.last is not None:
            name += f"/t={self.first}..{'' if self.last is None else self.last}"
        return name

    @property
    def where(self) -> str:
        """Its range of timesteps, as the end of a sentence; empty where it holds for all."""
        if not self.first and self.last is None:
            return ""
        return f" for t = {self.first} to {'T-1' if self.last is None else self.last}"

    def value(self, step: StepErrors) -> float:
        """Returns the number that it bounds, of one step."""
        return float(getattr(getattr(getattr(step, self.error), self.quantity), self.measure))

    def holds_at(self, t: int) -> bool:
        """Tells whether a timestep is in its range."""
        return self.first <= t and (self.last is None or t <= self.last)

    def worst(self, steps: Sequence[StepErrors]) -> StepErrors | None:
        """Returns the step in its range that is worst; None where there is none."""
        held = [step for step in steps if self.holds_at(step.t)]
        pick = min if self.measure in LARGER_IS_BETTER else max
        return pick(held, key=self.value, default=None)

    def allows(self, value: float) -> bool:
        """Tells whether a value is inside; what is not a number is not."""
        return value >= self.bound if self.measure in LARGER_IS_BETTER else value <= self.bound


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What an engine may differ by.

    Attributes:
        limits: Of the steps.
        pixels: Least share of final 8-bit values that differ by at most one level.
        equal: Least share that are equal.
        bias: Largest mean difference of a value, in levels, either way.
        psnr: Least PSNR of a final picture, in decibels; None where that is left open.
        ssim: Least structural similarity of a final picture; None where that is left open.
        general: Whether the pictures' are for networks and loops at large, see `over`.
    """

    limits: tuple[Limit, ...] = field(default_factory=lambda: _limits(TOLERANCE, 1e-3))
    pixels: float = 0.999
    equal: float = 0.99
    bias: float = 0.1
    psnr: float | None = None
    ssim: float | None = None
    general: bool = field(default=False, compare=False)

    @classmethod
    def of(cls, arithmetic: Arithmetic) -> Budget:
        """Returns what an engine may differ by that computes in an arithmetic.

        They hold for networks at large, and say nothing about one of them; `ddpm-deploy budget`
        derives a network's own. docs/parity.md has the figures and where they come from.
        """
        local, accumulated, pixels, equal, bias = {
            "fp32": (TOLERANCE, 1e-3, cls.pixels, cls.equal, cls.bias),
            "tf32": (2e-2, 2e-2, 0.99, 0.0, 0.1),
            "fp16": (BUDGETS["fp16"], 1e-2, 0.99, 0.0, 0.1),
            "bf16": (BUDGETS["bf16"], 5e-2, 0.95, 0.0, 0.25),
            "int8": (5e-1, 5e-1, 0.5, 0.0, 1.0),
        }[arithmetic]
        return cls(
            limits=_limits(local, accumulated, general=True),
            pixels=pixels,
            equal=equal,
            bias=bias,
            general=True,
        )

    def with_input_rounded(self, schedule: Schedule, roundoff: float) -> Budget:
        """Returns what is allowed of ε where x_t itself is rounded before the network sees it.

        ε is what x_t has beyond √ᾱ x_0, √(1-ᾱ) times as large as x_t near the end of a loop: what
        x_t loses, ε loses 1/√(1-ᾱ) times. x_s loses no more than x_t did, and its limits stay.

        Args:
            schedule: The network's; its prediction is ε.
            roundoff: Largest relative error of rounding one number of x_t.
        """
        (whole,) = [n for n in self.limits if n.name == "local/out/max"]
        others = [n for n in self.limits if n is not whole]
        # A limit for each octave of √(1-ᾱ), by the least in it.
        sigma = [math.sqrt(1 - schedule.alpha_bar_at(t)) for t in range(schedule.T)]
        octaves: dict[int, list[int]] = {}
        for t, each in enumerate(sigma):
            octaves.setdefault(math.floor(math.log2(each)), []).append(t)
        limits = [
            replace(
                whole,
                bound=whole.bound + roundoff / min(sigma[t] for t in held),
                first=min(held),
                last=max(held),
            )
            for held in octaves.values()
        ]
        return replace(self, limits=(*limits, *others))

    def over(self, gain: float, *, values: int) -> Budget:
        """Returns what is allowed in a loop, where a budget is general; other limits stay.

        A step from t = 999 to the end divides an error of ε by √ᾱ, 157 times as large: what
        rounding makes of the output, x has that much more of. And whatever the share of equal
        pixels, a single one may always lie at the edge between two levels.

        Args:
            gain: The largest part of an output's error that a step puts into x, see `gain`.
            values: Of the final pictures.
        """
        gain = max(gain, 1.0)
        local = (self.bound("local", "x") or 0.0) * gain

        def grown(limit: Limit) -> Limit:
            if not limit.general:
                return limit
            bound = local if limit.error == "local" else max(limit.bound, local)
            return replace(limit, bound=bound)

        limits = tuple(grown(limit) for limit in self.limits)
        if not self.general:
            return replace(self, limits=limits)
        edge = (values - 1) / max(values, 1)
        return replace(
            self,
            limits=limits,
            pixels=_loosened(self.pixels, gain),
            equal=min(_loosened(self.equal, gain), edge),
            bias=self.bias * gain,
        )

    def changed(
        self,
        *,
        local: float | None = None,
        accumulated: float | None = None,
        pixels: float | None = None,
    ) -> Budget:
        """Returns a copy with other bounds for local errors, accumulated ones, and pixels.

        Whoever sets one leaves the share of equal pixels open.

        Args:
            local: Largest local error of the output and of x.
            accumulated: Largest accumulated error of x.
            pixels: Least share within one level.
        """
        given = {
            ("local", "out"): local,
            ("local", "x"): local,
            ("accumulated", "x"): accumulated,
        }
        bounds = {key: bound for key, bound in given.items() if bound is not None}
        kept = [
            limit
            for limit in self.limits
            if limit.measure != "max" or (limit.error, limit.quantity) not in bounds
        ]
        new = [Limit(error=e, quantity=q, bound=bound) for (e, q), bound in bounds.items()]  # type: ignore[arg-type]
        equal = self.equal if not bounds and pixels is None else 0.0
        pixels = self.pixels if pixels is None else pixels
        general = self.general and equal == self.equal and pixels == self.pixels
        return replace(self, limits=(*new, *kept), pixels=pixels, equal=equal, general=general)

    def bound_at(self, error: ErrorKind, quantity: Quantity, t: int) -> float | None:
        """Returns the tightest maximum allowed at a timestep; None where there is no limit."""
        bounds = [
            limit.bound
            for limit in self.limits
            if (limit.error, limit.quantity, limit.measure) == (error, quantity, "max")
            and limit.holds_at(t)
        ]
        return min(bounds, default=None)

    def bound(self, error: ErrorKind, quantity: Quantity) -> float | None:
        """Returns the largest maximum allowed at any timestep; None where there is no limit."""
        bounds = [
            limit.bound
            for limit in self.limits
            if (limit.error, limit.quantity, limit.measure) == (error, quantity, "max")
        ]
        return max(bounds, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Returns what a budget file says, in JSON's types."""
        limits = []
        for limit in self.limits:
            entry = {"error": limit.error, "quantity": limit.quantity, "measure": limit.measure}
            key = "at_least" if limit.measure in LARGER_IS_BETTER else "at_most"
            ends = {"from": limit.first or None, "to": limit.last}
            held = {name: t for name, t in ends.items() if t is not None}
            limits.append({**entry, key: float(limit.bound), **held})
        pictures = {name: getattr(self, name) for name in PICTURES}
        kept = {name: float(value) for name, value in pictures.items() if value is not None}
        return {"format": FORMAT, **kept, "limit": limits}

    def to_toml(self, *, comment: str = "") -> str:
        """Returns the text of a budget file, which `read_budget` reads."""
        said = self.to_dict()
        limits = said.pop("limit")
        lines = [f"# {line}".rstrip() for line in comment.splitlines()]
        lines += [f"{name} = {value!r}" for name, value in said.items()]
        for limit in limits:
            lines += ["", "[[limit]]"]
            lines += [
                f'{name} = "{value}"' if isinstance(value, str) else f"{name} = {value!r}"
                for name, value in limit.items()
            ]
        return "\n".join(lines) + "\n"


def _limits(local: float, accumulated: float, *, general: bool = False) -> tuple[Limit, ...]:
    return (
        Limit(error="local", quantity="out", bound=local),
        Limit(error="local", quantity="x", bound=local, general=general),
        Limit(error="accumulated", quantity="x", bound=accumulated, general=general),
    )


def _loosened(share: float, gain: float) -> float:
    """Returns a share of pixels that leaves so many times as many out."""
    return share if gain == 1 else max(0.0, 1 - (1 - share) * gain)


def read_budget(path: Path) -> Budget:
    """Reads a budget from a TOML file.

    Raises:
        BudgetError: The file is missing, is no TOML, or says what no budget says.
    """
    try:
        import tomllib  # noqa: PLC0415  (Python 3.10 has it not)
    except ImportError:
        import tomli as tomllib  # type: ignore[no-redef, import-not-found, unused-ignore]  # noqa: PLC0415

    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        return _budget(data)
    except FileNotFoundError as error:
        raise BudgetError(
            f"There is no budget {path}.",
            hint=f"Name one of {', '.join(ARITHMETICS)}, or write one: ddpm-deploy budget ckpt.pt",
        ) from error
    except IsADirectoryError as error:
        raise BudgetError(
            f"{path} is a folder, and no budget.", hint="Name a file: --budget budget.toml"
        ) from error
    except OSError as error:
        raise BudgetError(
            f"{path} cannot be read: {error.strerror}.", hint="Check its permissions."
        ) from error
    except (ValueError, RecursionError) as error:
        raise BudgetError(
            f"{path} is no budget: {error}.",
            hint="docs/parity.md shows one; ddpm-deploy budget writes one.",
        ) from error


def _budget(data: Mapping[str, Any]) -> Budget:
    rest = dict(data)
    version = rest.pop("format", FORMAT)
    if version != FORMAT or isinstance(version, bool):
        raise ValueError(f"its format is {version!r}; this release reads {FORMAT}")
    entries = rest.pop("limit", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"limit is {entries!r}; it is written as [[limit]]")
    limits = tuple(_limit(entry) for entry in entries)
    if not limits and not rest:
        raise ValueError("it says nothing, so that it would allow everything")
    if unknown := sorted(rest.keys() - PICTURES.keys()):
        known = ", ".join(PICTURES)
        raise ValueError(f"it has {', '.join(unknown)}; there are {known} and [[limit]]")
    for name, value in rest.items():
        _check_number(name, value, *PICTURES[name])
    return Budget(limits=limits, **{"pixels": 0.0, "equal": 0.0, "bias": 255.0, **rest})


def _limit(entry: Mapping[str, Any]) -> Limit:
    given = dict(entry)
    limit = Limit(
        error=_one_of(given.pop("error", None), "error", get_args(ErrorKind)),
        quantity=_one_of(given.pop("quantity", None), "quantity", QUANTITIES),
        measure=_one_of(given.pop("measure", "max"), "measure", get_args(Measure)),
        bound=math.nan,
    )
    key = "at_least" if limit.measure in LARGER_IS_BETTER else "at_most"
    if key not in given:
        raise ValueError(f"a limit of {limit.measure} says {key} = a number")
    bound = _check_number(key, given.pop(key))
    if bound < 0 and key == "at_most":
        raise ValueError(f"{key} is {bound!r}; an error is at least 0")
    first, last = given.pop("from", 0), given.pop("to", None)
    for name, value in (("from", first), ("to", last)):
        whole = isinstance(value, int) and not isinstance(value, bool)
        if value is not None and (not whole or value < 0):
            raise ValueError(f"{name} is {value!r}; it is a timestep")
    if last is not None and last < first:
        raise ValueError(f"a limit goes from {first} to {last}")
    if given:
        raise ValueError(
            f"a limit has {', '.join(sorted(given))}; it may have error, quantity, measure, "
            "at_most, at_least, from, to"
        )
    return replace(limit, bound=bound, first=first, last=last)


def _one_of(value: Any, what: str, allowed: Sequence[str]) -> Any:
    if value not in allowed:
        raise ValueError(f"{what} is {value!r}; there are {', '.join(allowed)}")
    return value


def _check_number(
    name: str, value: object, least: float = -math.inf, largest: float = math.inf
) -> float:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or not least <= value <= largest
    ):
        ends = f" from {least:g} to {largest:g}" if math.isfinite(least) else ""
        raise ValueError(f"{name} is {value!r}; it is a number{ends}")
    return float(value)
