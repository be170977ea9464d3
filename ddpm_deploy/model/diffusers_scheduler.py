"""What a diffusers scheduler's config says: how the network was trained, and how it is sampled."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast, get_args

import numpy as np

from ddpm_deploy.errors import CheckpointError
from ddpm_deploy.model.facts import Facts, Source
from ddpm_deploy.sampling import (
    PREDICTIONS,
    FirstOrderEnd,
    Prediction,
    Sampler,
    Sampling,
    Spacing,
    Variance,
    timesteps,
)
from ddpm_deploy.schedule import Schedule, cosine, linear, scaled_linear

T = TypeVar("T")

_OWN: Mapping[str, Sampler] = {
    "DDPMScheduler": "ddpm",
    "DDPMParallelScheduler": "ddpm",
    "DDIMScheduler": "ddim",
    "DDIMParallelScheduler": "ddim",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
}
"""The schedulers whose loops are here."""

_MOST_TIMESTEPS = 100_000
_STEPS = {"DDPMPipeline": 1000, "DDIMPipeline": 50, "PNDMPipeline": 50}
_VARIANCES: Mapping[str, Variance] = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",  # the same number, by way of its logarithm
    "fixed_large": "fixed_large",
    "learned": "learned",
    "learned_range": "learned_range",
}
_SOLVER: Mapping[str, tuple[Any, ...]] = {
    "solver_order": (2, 1),
    "algorithm_type": ("dpmsolver++",),
    "solver_type": ("midpoint",),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "use_lu_lambdas": (False, None),
    "use_flow_sigmas": (False, None),
    "use_dynamic_shifting": (False, None),
    "lambda_min_clipped": (-float("inf"), None),
}
"""DPM-Solver's settings that are followed; the first is the class's default."""


@dataclass(frozen=True, kw_only=True)
class Loop:
    """What a spec takes from a scheduler; the fields are those of `ModelSpec`."""

    schedule: Schedule
    prediction: Prediction
    variance: Variance
    clip: float | None
    sampler: Sampler
    sampling: Sampling


def setting(values: Mapping[str, Any], name: str, default: T, *, of: str) -> T:
    """Returns what a config says of a name, in the kind of its default; that where it says nothing.

    Args:
        values: The config.
        name: Of the setting.
        default: Where it is left out, or null.
        of: What the config belongs to, for errors.

    Raises:
        CheckpointError: It is a value of another kind: a text for a number, or for true or false.
    """
    value = values.get(name)
    if value is None:
        return default
    kinds: tuple[type, ...] = (int, float) if isinstance(default, float) else (type(default),)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    sound = isinstance(value, kinds) and (isinstance(default, bool) or not isinstance(value, bool))
    if default is not None and (not sound or (number and not math.isfinite(value))):
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
        raise CheckpointError(
            f"The configuration of {of} says {name} {value!r}, which is not "
            f"{words.get(type(default), 'of its kind')}.",
            hint=f"Correct it there, or type --set {name}={_typed(default)}",
        )
    return cast("T", float(value) if isinstance(default, float) and number else value)


def _typed(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


class _Config:
    """A config that may be missing, of which every value that is read becomes a fact."""

    def __init__(self, values: Mapping[str, Any], facts: Facts) -> None:
        self.values, self.facts = values, facts
        self.source: Source = "config" if values else "assumed"

    def get(self, name: str, default: T, kind: Callable[[Any], T] | None = None) -> T:
        """Returns a value: the config's, or its class's default where it leaves the value out."""
        if not self.values:
            return self.facts.ask(name, default)
        value = setting(self.values, name, default, of="its scheduler")
        return self.facts.found(name, kind(value) if kind else value, "config")


def read_scheduler(
    values: Mapping[str, Any], pipeline: str, facts: Facts, *, learned: bool, source: str
) -> Loop:
    """Reads a scheduler's config.

    Args:
        values: The config; {} where there is none, and then everything is assumed.
        pipeline: The pipeline's class; empty where there is none.
        facts: Takes what is found.
        learned: Whether the network gives twice the channels it takes.
        source: What to call the checkpoint in errors.

    Raises:
        CheckpointError: It is no scheduler of a DDPM, or asks for what is not supported.
    """
    config = _Config(values, facts)
    name = str(values.get("_class_name", "DDPMScheduler"))
    if pipeline == "DDIMPipeline":  # it makes a DDIMScheduler of any other
        name = "DDIMScheduler"
    name = facts.found("scheduler", name, "config") if values else facts.ask("scheduler", name)
    if values and name not in _OWN and not values.keys() & {"beta_schedule", "trained_betas"}:
        raise CheckpointError(
            f"{source} is sampled by a {name}, which has no betas: it is no DDPM.",
            hint="The schedulers of DDPMs are DDPMScheduler, DDIMScheduler and their kin.",
        )
    schedule = facts.schedule(lambda: trained_schedule(values, source), source=config.source)
    prediction = _prediction(config, source)
    thresholds = setting(values, "thresholding", default=False, of=source)
    if thresholds and facts.found("thresholding", True, "config"):
        raise CheckpointError(
            f"The {name} of {source} limits x_0 by dynamic thresholding, whose limit is another "
            "for each image; the sampler's table has one.",
            hint="Clip to [-1, 1] in its place: --set thresholding=false",
        )
    sampler = _sampler(config, name)
    clip = None
    if sampler != "dpmpp_2m" and config.get("clip_sample", name in _OWN):
        clip = config.get("clip_sample_range", 1.0, float)
    variance = _variance(config, sampler, learned=learned, source=source)
    most = schedule.T - (sampler == "dpmpp_2m")
    default = _STEPS.get(pipeline, {"ddim": 50, "dpmpp_2m": 20}.get(sampler, 1000))
    if default == 1000 and sampler == "dpmpp_2m":
        default = 20  # that pipeline's own number would visit timesteps twice
    steps = facts.ask("steps", min(default, most))
    sampling = _sampling(config, sampler, steps)
    _check_steps(schedule, sampler, sampling, source)
    return Loop(
        schedule=schedule,
        prediction=prediction,
        variance=variance,
        clip=clip,
        sampler=sampler,
        sampling=sampling,
    )


def trained_schedule(values: Mapping[str, Any], source: str) -> Schedule:
    """Returns the schedule of training that a scheduler's config says.

    Args:
        values: The config; what it leaves out is at diffusers' default.
        source: What to call the checkpoint in errors.

    Raises:
        CheckpointError: It says none.
    """
    try:
        schedule = _plain_schedule(values)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"The scheduler of {source} has betas that are none: {error}.",
            hint="Say the schedule of training: --schedule linear --timesteps 1000",
        ) from error
    if not setting(values, "rescale_betas_zero_snr", default=False, of=source):
        return schedule
    # Lin et al. 2023, https://arxiv.org/abs/2305.08891, Algorithm 1: √ᾱ is moved to end at 0.
    root = np.sqrt(schedule.alpha_bar)
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    alpha_bar = np.concatenate([[1.0], root**2])
    return Schedule(
        1.0 - alpha_bar[1:] / alpha_bar[:-1],
        f"{schedule.name} to zero SNR",
        schedule.parameters,
    )


def _plain_schedule(values: Mapping[str, Any]) -> Schedule:
    total = values.get("num_train_timesteps", 1000)
    if not isinstance(total, int) or isinstance(total, bool) or not 1 <= total <= _MOST_TIMESTEPS:
        raise ValueError(f"num_train_timesteps is {total!r}, not 1 to {_MOST_TIMESTEPS}")
    start, end = float(values.get("beta_start", 1e-4)), float(values.get("beta_end", 0.02))
    if values.get("trained_betas") is not None:
        return Schedule(values["trained_betas"], "trained_betas")
    match values.get("beta_schedule", "linear"):
        case "linear":
            return linear(total, start=start, end=end)
        case "scaled_linear":
            return scaled_linear(total, start=start, end=end)
        case "squaredcos_cap_v2":
            return cosine(total)
        case "sigmoid":  # of β, where others' schedule of that name is of ᾱ
            beta = (end - start) / (1 + np.exp(-np.linspace(-6, 6, total))) + start
            return Schedule(beta, "sigmoid of beta", {"start": start, "end": end})
        case "laplace":
            u = np.arange(total + 1) / total
            far = 0.5 - u
            log_snr = -0.5 * np.copysign(1, far) * np.log(1 - 2 * np.abs(far) + 1e-6)
            alpha_bar = np.sqrt(1 / (1 + np.exp(-log_snr)))
            return Schedule(np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999), "laplace")
        case other:
            raise ValueError(f"beta_schedule is {other!r}")


def _prediction(config: _Config, source: str) -> Prediction:
    values = config.values
    # Before prediction_type there was a switch for it.
    old = "epsilon" if setting(values, "predict_epsilon", default=True, of=source) else "sample"
    found = values.get("prediction_type", old)
    if found not in PREDICTIONS:
        raise CheckpointError(
            f"The network of {source} predicts {found!r}; there are {', '.join(PREDICTIONS)}.",
            hint="Networks that were trained by flow matching are not DDPMs.",
        )
    return config.facts.prediction(cast("Prediction", found), source=config.source)


def _sampler(config: _Config, name: str) -> Sampler:
    facts, own = config.facts, _OWN.get(name)
    if own is None:  # its loop is not here: which stands for it is assumed, and says so
        other: Sampler = "ddpm" if "Ancestral" in name else "ddim"
        return facts.ask("sampler", other, among=get_args(Sampler))
    if own == "dpmpp_2m":
        others = [
            f"{key} {config.values[key]}"
            for key, followed in _SOLVER.items()
            if config.values.get(key, followed[0]) not in followed
        ]
        if others:
            facts.remark("not_followed", ", ".join(others), "config")
            return facts.ask("sampler", own, among=get_args(Sampler))
    if not config.values:
        return facts.ask("sampler", own, among=get_args(Sampler))
    found = facts.found("sampler", own, "config")
    if found not in get_args(Sampler):
        raise CheckpointError(
            f"--set sampler={found} is not one of {', '.join(get_args(Sampler))}.",
            hint="Leave it out, and choose when you draw: ddpm-deploy sample --sampler ddim",
        )
    return found


def _variance(config: _Config, sampler: Sampler, *, learned: bool, source: str) -> Variance:
    values, facts = config.values, config.facts
    found = str(values.get("variance_type") or "fixed_small")
    if learned and not found.startswith("learned"):
        found = facts.ask("variance_type", "learned_range")
    elif sampler == "ddpm" or learned or not values:
        found = config.get("variance_type", "fixed_small")
    else:
        found = "fixed_small"  # what ddim scales by its eta
    hint = "Take another: --set variance_type=fixed_small, fixed_large or learned_range"
    if found not in _VARIANCES:
        why = "; it gives no numbers in diffusers itself" if found == "fixed_large_log" else ""
        raise CheckpointError(
            f"The scheduler of {source} has the variance_type {found}{why}.", hint=hint
        )
    if found == "learned" and sampler == "ddpm":
        raise CheckpointError(
            f"The scheduler of {source} has the variance_type learned, by which diffusers takes "
            "the root of what the network gives; the sampler's table has the logarithm.",
            hint=hint,
        )
    if found.startswith("learned") != learned:
        raise CheckpointError(
            f"The scheduler of {source} has the variance_type {found}, and its network gives "
            f"{'twice' if learned else 'only'} the channels of a picture.",
            hint=hint,
        )
    return _VARIANCES[found]


def _sampling(config: _Config, sampler: Sampler, steps: int) -> Sampling:
    solver = sampler == "dpmpp_2m"
    among = get_args(Spacing)
    default = "linspace" if solver and config.values else "leading"
    spacing = cast("Spacing", config.get("timestep_spacing", default))
    if spacing not in among:
        raise CheckpointError(
            f"The timestep_spacing is {spacing!r}; there are {', '.join(among)}.",
            hint="Say how the timesteps are chosen: --set timestep_spacing=leading",
        )
    offset = config.get("steps_offset", 0) if spacing == "leading" else 0
    if sampler == "ddim":
        clean = config.get("set_alpha_to_one", True)
        return Sampling(
            steps=steps,
            spacing=spacing,
            offset=offset,
            direction="network",
            previous="stride",
            final="clean" if clean else "first",
        )
    if sampler == "ddpm":
        return Sampling(steps=steps, spacing=spacing, offset=offset, noise_at_end=True)
    if not solver:
        return Sampling()
    end: FirstOrderEnd = "few"
    if config.get("euler_at_final", False):
        end = "always"
    elif not config.get("lower_order_final", True):
        end = "never"
    last = config.get("final_sigmas_type", "zero")
    return Sampling(
        steps=steps,
        spacing=spacing,
        offset=offset,
        order=1 if config.get("solver_order", 2) == 1 else 2,
        karras=bool(config.get("use_karras_sigmas", False)),
        final_sigma="zero" if last == "zero" else "least",
        first_order_end=end,
    )


def _check_steps(schedule: Schedule, sampler: Sampler, sampling: Sampling, source: str) -> None:
    count = cast("int", sampling.steps)
    if sampler == "dome272":
        return
    extra = sampler == "dpmpp_2m" and sampling.spacing != "trailing"
    try:
        timesteps(schedule.T, count + extra, spacing=sampling.spacing, offset=sampling.offset)
    except ValueError as error:
        raise CheckpointError(
            f"The scheduler of {source} cannot do {count} steps: {error}.",
            hint=f"Take fewer: --set steps={max(schedule.T // 2, 1)}",
        ) from error
