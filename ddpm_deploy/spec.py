"""ModelSpec: what a network is, in words that travel with it.

`export` writes it, every engine reads it: in an ONNX file's metadata under `METADATA_KEY`, in a
checkpoint of ours under `spec`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

import numpy as np

from ddpm_deploy._version import __version__
from ddpm_deploy.errors import SpecError
from ddpm_deploy.sampling import (
    SAMPLERS,
    Prediction,
    Sampler,
    Spacing,
    Transition,
    Variance,
    ddim,
    ddpm,
    dome272,
)
from ddpm_deploy.schedule import Schedule, named_schedule

FORMAT = 1
"""Version of the JSON form. A reader refuses a later one."""

METADATA_KEY = "ddpm_deploy.spec"
"""Key of the spec in an ONNX file's `metadata_props`."""

Meaning = Literal["class_label", "observation"]
Rounding = Literal["nearest", "truncate"]


@dataclass(frozen=True, kw_only=True)
class Condition:
    """A named input of the network besides x and t.

    Attributes:
        name: Name of the graph input.
        meaning: `class_label`, or `observation` for a vector of numbers.
        dtype: NumPy's name of the dtype: `int64` for labels.
        shape: Shape for one sample, without the batch axis; () for a label.
        classes: Number of classes of a label; None for an observation.
        null: The label that means "no label", which guidance needs; None where there is none.
        names: What the classes are called, in order; empty where nobody says.
    """

    name: str
    meaning: Meaning
    dtype: str
    shape: tuple[int, ...] = ()
    classes: int | None = None
    null: int | None = None
    names: tuple[str, ...] = ()

    def _check(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"a condition's name is {self.name!r}")
        np.dtype(self.dtype)  # TypeError when NumPy knows no such
        if not all(isinstance(name, str) for name in self.names):
            raise ValueError(f"the names of {self.name} are {self.names}")
        if self.names and len(self.names) != self.classes:
            raise ValueError(f"{self.name} has {self.classes} classes and {len(self.names)} names")
        if not all(_whole(size, 1) for size in self.shape):
            raise ValueError(f"the shape of {self.name} is {self.shape}")
        for what, number, least in [("classes", self.classes, 1), ("null", self.null, 0)]:
            if number is not None and not _whole(number, least):
                raise ValueError(f"{what} of {self.name} is {number!r}; it must be a whole number")


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Everything that a sampler must know about a network.

    Attributes:
        sample_shape: Shape of one sample without the batch axis: (C, H, W), or (C, L).
        schedule: The schedule that the network was trained with.
        prediction: What its output is: `epsilon`, `sample` or `v_prediction`.
        variance: Variance of ancestral sampling: `fixed_small` β̃, `fixed_large` β, or what the
            second half of the output says: `learned`, `learned_range`.
        clip: x_0 is clipped to [-clip, clip] in the loop; None leaves it.
        value_range: The values of training data, as (darkest, brightest).
        rounding: How pictures become uint8: to the `nearest` number, or `truncate`.
        first_timestep: The least timestep seen in training: 0, or 1 for dome272's.
        timestep: What the network does with the index t inside the graph: `index` uses it as it is.
        sampler: The family's own loop, the default of `sample`.
        conditions: The further inputs, in order.
        family: Where the architecture comes from.
        checkpoint_sha256: Hash of the checkpoint file; empty when there was none.
        tool_version: The ddpm-deploy that wrote this.
    """

    sample_shape: tuple[int, ...]
    schedule: Schedule
    prediction: Prediction = "epsilon"
    variance: Variance = "fixed_small"
    clip: float | None = 1.0
    value_range: tuple[float, float] = (-1.0, 1.0)
    rounding: Rounding = "nearest"
    first_timestep: int = 0
    timestep: Literal["index"] = "index"
    sampler: Sampler = "ddpm"
    conditions: tuple[Condition, ...] = ()
    family: str = "unknown"
    checkpoint_sha256: str = ""
    tool_version: str = field(default=__version__)

    @property
    def label(self) -> Condition | None:
        """The class label among the conditions, None for an unconditional network."""
        return next((c for c in self.conditions if c.meaning == "class_label"), None)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of one output; twice the channels where the variance is learned."""
        channels, *rest = self.sample_shape
        return (channels * (2 if self.variance in {"learned", "learned_range"} else 1), *rest)

    def table(
        self,
        sampler: Sampler | None = None,
        steps: int | Sequence[int] | None = None,
        *,
        eta: float = 0.0,
        spacing: Spacing = "leading",
    ) -> list[Transition]:
        """Tabulates a sampler for this network.

        Args:
            sampler: `ddpm`, `ddim` or `dome272`; the family's own when None.
            steps: Transitions to keep, 1 to T; all when None. Or the timesteps to visit, which for
                `dome272` is its step between any two: σ² = β between them, without clipping.
            eta: Share of noise for `ddim`, 0 to 1.
            spacing: How `steps` are chosen, see `timesteps`.

        Raises:
            ValueError: A setting is outside its range, or the sampler does not have it.
        """
        sampler = sampler or self.sampler
        match sampler:
            case "ddim":
                return ddim(
                    self.schedule,
                    steps,
                    eta=eta,
                    prediction=self.prediction,
                    clip=self.clip,
                    spacing=spacing,
                )
            case "ddpm":
                if eta:
                    raise ValueError("eta belongs to ddim; ddpm's noise is fixed by its variance")
                return ddpm(
                    self.schedule,
                    steps,
                    prediction=self.prediction,
                    variance=self.variance,
                    clip=self.clip,
                    spacing=spacing,
                )
            case "dome272":
                own = self.schedule.T - 1
                chosen = isinstance(steps, Sequence)
                if not (chosen or steps in {None, own}) or eta or spacing != "leading":
                    raise ValueError(
                        f"the dome272 loop has neither a stride nor eta: {own} steps here; "
                        "--sampler ddim and ddpm have them"
                    )
                if self.prediction != "epsilon" or self.output_shape != self.sample_shape:
                    raise ValueError(
                        "the dome272 loop takes networks that predict ε alone; this one gives "
                        f"{self.prediction} with {self.variance} variance"
                    )
                if chosen:
                    return ddpm(self.schedule, steps, variance="fixed_large", clip=None)
                return dome272(self.schedule)
            case _:
                raise ValueError(f"sampler is {sampler!r}; there are {', '.join(SAMPLERS)}")

    def to_json(self) -> str:
        """Returns the spec as one JSON object; floats keep every bit."""
        return json.dumps(self.to_dict(), sort_keys=True)

    def to_dict(self) -> dict[str, Any]:
        """Returns the spec as JSON's types: numbers, strings, lists and dicts."""
        schedule: dict[str, Any] = {"name": self.schedule.name, "T": self.schedule.T}
        if _is_named(self.schedule):
            schedule["parameters"] = dict(self.schedule.parameters)
        else:
            schedule["beta"] = self.schedule.beta.tolist()
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        conditions = [{f.name: getattr(c, f.name) for f in fields(c)} for c in self.conditions]
        return {"format": FORMAT, **plain, "schedule": schedule, "conditions": conditions}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], *, source: str) -> ModelSpec:
        """Reads the spec that an ONNX file carries.

        Args:
            metadata: The file's `metadata_props`.
            source: What to call the file in errors.

        Raises:
            SpecError: There is none, or as in `from_json`.
        """
        if METADATA_KEY not in metadata:
            raise SpecError(
                f"{source} carries no ddpm-deploy spec, so its schedule and its inputs are "
                "unknown.",
                hint="Export it from its checkpoint: ddpm-deploy export CHECKPOINT -o unet.onnx",
            )
        return cls.from_json(metadata[METADATA_KEY], source=source)

    @classmethod
    def from_json(cls, text: str, *, source: str = "this file") -> ModelSpec:
        """Reads what `to_json` wrote.

        Args:
            text: The JSON.
            source: What to call the place it came from in errors.

        Raises:
            SpecError: It is no spec, a later version's, or damaged.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:  # no JSON, a number or a nest without end
            raise _damaged(source, f"not JSON: {error}") from error
        return cls.from_dict(data, source=source)

    @classmethod
    def from_dict(cls, data: object, *, source: str = "this file") -> ModelSpec:
        """Reads what `to_dict` gave; arguments and errors as in `from_json`."""
        if not isinstance(data, dict) or not isinstance(data.get("format"), int):
            raise _damaged(source, "no format number")
        data = dict(data)
        version = data.pop("format")
        if version > FORMAT:
            raise SpecError(
                f"The spec in {source} has format {version}, written by ddpm-deploy "
                f"{data.get('tool_version', 'of a later version')}; this is ddpm-deploy "
                f"{__version__}, which reads formats up to {FORMAT}.",
                hint="Update ddpm-deploy here: pip install --upgrade ddpm-deploy",
            )
        try:
            known = {f.name for f in fields(cls)}
            if unknown := sorted(data.keys() - known):
                raise ValueError(f"unknown fields: {', '.join(unknown)}")
            data["schedule"] = _read_schedule(data["schedule"])
            data["conditions"] = tuple(
                Condition(**{**c, "shape": tuple(c["shape"]), "names": tuple(c.get("names", ()))})
                for c in data["conditions"]
            )
            data["sample_shape"] = tuple(data["sample_shape"])
            low, high = data["value_range"]
            data["value_range"] = (float(low), float(high))
            spec = cls(**data)
            spec._check()
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise _damaged(source, what) from error
        return spec

    def with_changes(self, **changes: Any) -> ModelSpec:
        """Returns a copy with some fields changed.

        Raises:
            ValueError: The result is no valid spec.
        """
        spec = replace(self, **changes)
        spec._check()
        return spec

    def _check(self) -> None:
        if not self.sample_shape or not all(_whole(size, 1) for size in self.sample_shape):
            raise ValueError(f"sample_shape is {self.sample_shape}")
        texts = ("family", "checkpoint_sha256", "tool_version")
        if wrong := [name for name in texts if not isinstance(getattr(self, name), str)]:
            raise ValueError(f"{wrong[0]} is {getattr(self, wrong[0])!r}; it must be text")
        if not _whole(self.first_timestep, 0) or self.first_timestep >= self.schedule.T:
            raise ValueError(
                f"first_timestep is {self.first_timestep!r}; "
                f"it must lie in 0..{self.schedule.T - 1}"
            )
        for name, value, allowed in [
            ("prediction", self.prediction, get_args(Prediction)),
            ("variance", self.variance, get_args(Variance)),
            ("rounding", self.rounding, get_args(Rounding)),
            ("timestep", self.timestep, ("index",)),
            ("sampler", self.sampler, SAMPLERS),
            *(("a condition's meaning", c.meaning, get_args(Meaning)) for c in self.conditions),
        ]:
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; there are {', '.join(allowed)}")
        if self.clip is not None and not (_number(self.clip) and self.clip > 0):
            raise ValueError(f"clip is {self.clip!r}; it must be a positive number, or None")
        low, high = self.value_range
        if not (_number(low) and _number(high) and low < high):
            raise ValueError(f"value_range is {self.value_range}")
        taken = {"x", "t"}
        for condition in self.conditions:
            condition._check()
            if condition.name in taken:
                raise ValueError(f"two inputs are called {condition.name!r}")
            taken.add(condition.name)


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_named(schedule: Schedule) -> bool:
    """Tells whether name and parameters alone give these betas, whatever the schedule is called."""
    try:
        return named_schedule(schedule.name, schedule.T, **schedule.parameters) == schedule
    except ValueError:
        return False


def _read_schedule(data: Mapping[str, Any]) -> Schedule:
    if not isinstance(data["name"], str):
        raise TypeError(f"the schedule's name is {data['name']!r}; it must be text")
    if "beta" in data:
        return Schedule(data["beta"], data["name"])
    return named_schedule(data["name"], data["T"], **data["parameters"])


def _damaged(source: str, what: str) -> SpecError:
    return SpecError(
        f"The spec in {source} is damaged ({what}).",
        hint="Export the network again: ddpm-deploy export CHECKPOINT",
    )
