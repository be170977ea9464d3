"""ModelSpec: what a network is, in words that travel with it.

`export` writes it, every engine reads it: in an ONNX file's metadata under `METADATA_KEY`, in a
checkpoint of ours under `spec`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args

import numpy as np

from ddpm_deploy._version import __version__
from ddpm_deploy.arrays import Samples
from ddpm_deploy.errors import SpecError
from ddpm_deploy.sampling import (
    SAMPLERS,
    FinalSigma,
    FirstOrderEnd,
    Prediction,
    Sampler,
    Sampling,
    Spacing,
    Transition,
    Variance,
    ddim,
    ddpm,
    dome272,
)
from ddpm_deploy.schedule import Schedule, named_schedule
from ddpm_deploy.solvers import dpmpp_2m

FORMAT = 2
"""Version of the JSON form. A reader refuses a later one."""

METADATA_KEY = "ddpm_deploy.spec"
"""Key of the spec in an ONNX file's `metadata_props`."""

Meaning = Literal["class_label", "observation", "self_condition"]
Rounding = Literal["nearest", "truncate"]
Timestep = Literal["index", "rescaled"]


@dataclass(frozen=True, kw_only=True)
class Condition:
    """A named input of the network besides x and t.

    Attributes:
        name: Name of the graph input.
        meaning: `class_label`; `observation`, numbers that the user gives; or `self_condition`, the
            last step's x_0, which the loop gives.
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
class Restore:
    """What a sample's numbers mean, where training normalised them: x · scale + offset.

    Attributes:
        scale: One number, or one for each index along `axis`.
        offset: As many.
        axis: Of the sample's shape.
    """

    scale: tuple[float, ...]
    offset: tuple[float, ...]
    axis: int = -1

    def __call__(self, x: Samples) -> Samples:
        """Returns samples in their own units: float32, the shape of x, (N, *sample_shape)."""
        shape = [1] * x.ndim
        shape[self.axis if self.axis < 0 else self.axis + 1] = len(self.scale)
        scale = np.array(self.scale, dtype=np.float32).reshape(shape)
        offset = np.array(self.offset, dtype=np.float32).reshape(shape)
        return np.asarray(x * scale + offset, dtype=np.float32)

    def _check(self, sample_shape: tuple[int, ...]) -> None:
        numbers = (*self.scale, *self.offset)
        if not (-len(sample_shape) <= self.axis < len(sample_shape)) or not all(
            map(_number, numbers)
        ):
            raise ValueError(f"restore is {self}")
        length = sample_shape[self.axis]
        if len(self.scale) != len(self.offset) or len(self.scale) not in {1, length}:
            raise ValueError(f"restore has {len(self.scale)} scales for {length} values")


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
        timestep: What the network does with the index t inside the graph: `index` uses it as it is,
            `rescaled` as t · 1000 / T.
        sampler: The family's own loop, the default of `sample`.
        sampling: How that loop goes.
        conditions: The further inputs, in order.
        guidance: Scale of the classifier-free guidance inside the graph; None where the loop may
            guide.
        restore: What the samples mean: their own numbers are x · scale + offset; None where they
            are the values themselves, as pictures are.
        family: Where the architecture comes from.
        network: What its checkpoint does not say of it and the exporter was told, by name.
        weights: Which of the checkpoint's weights were taken: `ema`, `online`, or empty.
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
    timestep: Timestep = "index"
    sampler: Sampler = "ddpm"
    sampling: Sampling = field(default_factory=Sampling)
    conditions: tuple[Condition, ...] = ()
    guidance: float | None = None
    restore: Restore | None = None
    family: str = "unknown"
    network: Mapping[str, Any] = field(default_factory=dict)
    weights: Literal["ema", "online", ""] = ""
    checkpoint_sha256: str = ""
    tool_version: str = field(default=__version__)

    @property
    def label(self) -> Condition | None:
        """The class label among the conditions, None for an unconditional network."""
        return next((c for c in self.conditions if c.meaning == "class_label"), None)

    @property
    def self_condition(self) -> Condition | None:
        """The input that takes the last step's x_0, None for most networks."""
        return next((c for c in self.conditions if c.meaning == "self_condition"), None)

    @property
    def observations(self) -> tuple[Condition, ...]:
        """The inputs that take numbers from the user."""
        return tuple(c for c in self.conditions if c.meaning == "observation")

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of one output; twice the channels where the variance is learned."""
        channels, *rest = self.sample_shape
        return (channels * (2 if self.variance in {"learned", "learned_range"} else 1), *rest)

    def loop(
        self,
        sampler: Sampler | None = None,
        steps: int | Sequence[int] | None = None,
        *,
        eta: float | None = None,
        spacing: Spacing | None = None,
    ) -> tuple[Sampler, Sampling]:
        """Returns a loop in full: the family's own, but for what is given.

        Args:
            sampler: `ddpm`, `ddim`, `dome272` or `dpmpp_2m`; the family's own when None. Another
                one than the family's goes by the defaults of `Sampling`.
            steps: Transitions to keep, or the timesteps to visit.
            eta: Share of noise for `ddim`, 0 to 1.
            spacing: How `steps` are chosen.
        """
        own = self.sampling if sampler in {None, self.sampler} else Sampling()
        given: dict[str, Any] = {"steps": steps, "eta": eta, "spacing": spacing}
        if isinstance(steps, Sequence):
            given["steps"] = tuple(steps)
        changes = {name: value for name, value in given.items() if value is not None}
        return sampler or self.sampler, replace(own, **changes)

    def table(
        self,
        sampler: Sampler | None = None,
        steps: int | Sequence[int] | None = None,
        *,
        eta: float | None = None,
        spacing: Spacing | None = None,
    ) -> list[Transition]:
        """Tabulates a sampler for this network: the family's own loop, but for what is given.

        Args:
            sampler: As in `loop`.
            steps: Transitions to keep, 1 to T. Or the timesteps to visit, which for `dome272` is
                its step between any two: σ² = β between them, without clipping. For `dpmpp_2m` by
                Karras et al.'s σ they take the place of its own.
            eta: Share of noise for `ddim`, 0 to 1.
            spacing: How `steps` are chosen, see `timesteps`.

        Raises:
            ValueError: A setting is outside its range, or the sampler does not have it.
        """
        sampler, loop = self.loop(sampler, steps, eta=eta, spacing=spacing)
        if loop.eta and sampler == "ddpm":
            raise ValueError("eta belongs to ddim; ddpm's noise is fixed by its variance")
        if loop.eta and sampler == "dpmpp_2m":
            raise ValueError("eta belongs to ddim; dpmpp_2m adds no noise")
        match sampler:
            case "ddim":
                return ddim(
                    self.schedule,
                    loop.steps,
                    eta=loop.eta,
                    prediction=self.prediction,
                    clip=self.clip,
                    spacing=loop.spacing,
                    offset=loop.offset,
                    direction=loop.direction,
                    previous=loop.previous,
                    final=loop.final,
                )
            case "ddpm":
                return ddpm(
                    self.schedule,
                    loop.steps,
                    prediction=self.prediction,
                    variance=self.variance,
                    clip=self.clip,
                    spacing=loop.spacing,
                    offset=loop.offset,
                    noise_at_end=loop.noise_at_end,
                )
            case "dome272":
                return self._dome272(loop)
            case "dpmpp_2m":
                return dpmpp_2m(
                    self.schedule,
                    loop.steps,
                    prediction=self.prediction,
                    order=loop.order,
                    spacing=loop.spacing,
                    offset=loop.offset,
                    karras=loop.karras and not isinstance(loop.steps, tuple),
                    final_sigma=loop.final_sigma,
                    first_order_end=loop.first_order_end,
                )
            case _:
                raise ValueError(f"sampler is {sampler!r}; there are {', '.join(SAMPLERS)}")

    def _dome272(self, loop: Sampling) -> list[Transition]:
        own = self.schedule.T - 1
        chosen = isinstance(loop.steps, tuple)
        if not (chosen or loop.steps in {None, own}) or loop.eta or loop.spacing != "leading":
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
            return ddpm(self.schedule, loop.steps, variance="fixed_large", clip=None)
        return dome272(self.schedule)

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
        return {
            "format": FORMAT,
            **plain,
            "schedule": schedule,
            "conditions": conditions,
            "sampling": asdict(self.sampling),
            "restore": self.restore and asdict(self.restore),
            "network": dict(self.network),
        }

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
            data["network"] = _tupled(data.get("network", {}))
            data["sampling"] = Sampling(**_tupled(data.get("sampling", {})))
            if data.get("restore") is not None:
                data["restore"] = Restore(**_tupled(data["restore"]))
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
            ("timestep", self.timestep, get_args(Timestep)),
            ("weights", self.weights, ("ema", "online", "")),
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
        _check_sampling(self.sampling, self.schedule.T)
        if self.guidance is not None and not _number(self.guidance):
            raise ValueError(f"guidance is {self.guidance!r}; it must be a number, or None")
        if self.restore is not None:
            self.restore._check(self.sample_shape)
        if not isinstance(self.network, Mapping) or not all(
            isinstance(name, str) for name in self.network
        ):
            raise ValueError(f"network is {self.network!r}")
        taken = {"x", "t"}
        for condition in self.conditions:
            condition._check()
            if condition.name in taken:
                raise ValueError(f"two inputs are called {condition.name!r}")
            taken.add(condition.name)


def _tupled(data: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(v) if isinstance(v, list) else v for name, v in data.items()}


def _check_sampling(sampling: Sampling, T: int) -> None:  # noqa: N803
    steps = sampling.steps if isinstance(sampling.steps, tuple) else (sampling.steps,)
    counts = not isinstance(sampling.steps, tuple)
    for number in steps:
        least, most = (1, T) if counts else (0, T - 1)
        if number is not None and not (_whole(number, least) and number <= most):
            raise ValueError(f"its loop has the steps {sampling.steps!r}; T is {T}")
    for name, value, allowed in [
        ("spacing", sampling.spacing, get_args(Spacing)),
        ("direction", sampling.direction, ("clipped", "network")),
        ("previous", sampling.previous, ("next", "stride")),
        ("final", sampling.final, ("clean", "first")),
        ("noise_at_end", sampling.noise_at_end, (False, True)),
        ("order", sampling.order, (1, 2)),
        ("karras", sampling.karras, (False, True)),
        ("final_sigma", sampling.final_sigma, get_args(FinalSigma)),
        ("first_order_end", sampling.first_order_end, get_args(FirstOrderEnd)),
    ]:
        if value not in allowed:
            raise ValueError(f"the {name} of its loop is {value!r}; there are {allowed}")
    if not _number(sampling.eta) or not 0 <= sampling.eta <= 1 or not _whole(sampling.offset, 0):
        raise ValueError(f"its loop is {sampling}")


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
