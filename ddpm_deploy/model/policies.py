"""What the action networks of both projects share: observations in, a loop, actions out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, cast, get_args

import torch
from torch import Tensor, nn

from ddpm_deploy.errors import CheckpointError
from ddpm_deploy.model.conditional_unet1d import GROUPS, ConditionalUNet1D, UNet1DWidths
from ddpm_deploy.model.diffusers_scheduler import trained_schedule
from ddpm_deploy.model.facts import Facts, Source, T
from ddpm_deploy.model.family import Opened, Reading, State
from ddpm_deploy.sampling import PREDICTIONS, Prediction, Sampler, Sampling, Spacing, Variance
from ddpm_deploy.spec import Condition, ModelSpec, Restore

MARKS = (
    "diffusion_step_encoder.1.weight",
    "diffusion_step_encoder.3.weight",
    "down_modules.0.0.cond_encoder.1.weight",
    "mid_modules.1.cond_encoder.1.weight",
    "final_conv.0.block.0.weight",
    "final_conv.1.weight",
)
"""Names that the network has in both projects."""

MODULES = ("diffusion_step_encoder.", "down_modules.", "mid_modules.", "up_modules.", "final_conv.")
"""What the names of the network begin with."""


class Normalise(nn.Module):
    """(x - minus) / over · times + plus, without the parts that are None.

    The order is the projects' own: a scale and an offset made of them would cancel worse.

    Attributes:
        minus: float32, one number for each of the last axis; likewise the others.
    """

    def __init__(
        self,
        *,
        minus: Tensor | None = None,
        over: Tensor | None = None,
        times: Tensor | None = None,
        plus: Tensor | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("minus", minus), ("over", over), ("times", times), ("plus", plus)):
            self.register_buffer(name, value, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalises along the last axis."""
        minus, over = cast("Tensor | None", self.minus), cast("Tensor | None", self.over)
        times, plus = cast("Tensor | None", self.times), cast("Tensor | None", self.plus)
        x = x if minus is None else x - minus
        x = x if over is None else x / over
        x = x if times is None else x * times
        return x if plus is None else x + plus


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What a policy sees.

    Attributes:
        name: Of the graph's input.
        size: Numbers at one step.
        normalise: From their own units; None where they are taken as they are.
    """

    name: str
    size: int
    normalise: Normalise | None = None


class PolicyNetwork(nn.Module):
    """A UNet that takes observations in their own units.

    Args:
        unet: Whose condition is what the observations become.
        observations: In the order in which a step's numbers are joined; none for a network whose
            condition comes ready, or that has none.
    """

    def __init__(self, unet: ConditionalUNet1D, observations: Sequence[Observation] = ()) -> None:
        super().__init__()
        self.unet = unet
        self.normalise = nn.ModuleList(o.normalise or nn.Identity() for o in observations)

    def forward(
        self, x: Tensor, t: Tensor, first: Tensor | None = None, second: Tensor | None = None
    ) -> Tensor:
        """Predicts for a sequence of actions; shapes as in `ConditionalUNet1D`, `Observation`."""
        condition = first
        if self.normalise:
            given = [each for each in (first, second) if each is not None]
            seen = [n(each) for n, each in zip(self.normalise, given, strict=True)]
            condition = torch.cat(seen, dim=-1).flatten(start_dim=1)
        out: Tensor = self.unet(x, t, condition)
        return out


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What a family found out about a policy, before it goes through the facts.

    Attributes:
        state: The UNet's weights, under the names of `ConditionalUNet1D`.
        left: Tensors that nobody knows; loading refuses them.
        settings: `horizon`, `n_obs_steps`, `n_action_steps`, `n_groups`, and
            `num_inference_steps`, where the configuration says them.
        first_action: Of the sequence, the first that is carried out.
        observations: What the graph takes in its own units; none where an encoder comes between.
        outside: What of the policy is not in the graph, in words; empty where all is.
        scheduler: diffusers' settings of the loop, with `kind`, and `eta` and
            `use_clipped_model_output`; empty where nothing is said.
        restore: What the actions mean.
    """

    state: State
    left: State = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    first_action: int = 0
    observations: tuple[Observation, ...] = ()
    outside: str = ""
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    restore: Restore | None = None


def read_policy(policy: Policy, opened: Opened, facts: Facts, *, family: str) -> Reading:
    """Makes the network and its spec of what a family found.

    Raises:
        CheckpointError: It is damaged, or something that this network is not.
    """
    widths = UNet1DWidths.of(policy.state)
    path, settings = opened.path, policy.settings
    facts.found("action_dim", widths.actions)
    facts.found("down_dims", widths.down)
    facts.found("kernel_size", widths.kernel)
    facts.found("diffusion_step_embed_dim", widths.step)
    facts.found("film", "scale and shift" if widths.scale else "shift")
    groups = say(facts, "n_groups", settings.get("n_groups"), GROUPS)
    horizon = _horizon(facts, settings.get("horizon"), widths, opened)
    conditions = _conditions(policy, widths, facts, opened)
    if (count := settings.get("n_action_steps")) is not None:
        last = policy.first_action + facts.found("n_action_steps", count, "config") - 1
        facts.remark(
            "carried out", f"{policy.first_action} to {last} of 0 to {horizon - 1}", "config"
        )
    if policy.outside:
        facts.remark("not in the graph", policy.outside, "weights")
    loop = _loop_of(policy.scheduler, facts, steps=settings.get("num_inference_steps"))
    spec = ModelSpec(
        sample_shape=(horizon, widths.actions),
        conditions=conditions,
        restore=policy.restore,
        family=family,
        **loop,
    )
    try:
        spec.with_changes().table()
    except ValueError as error:
        raise CheckpointError(
            f"{path} describes a loop that cannot be: {error}.",
            hint="Type the steps it is used with: --set num_inference_steps=10",
        ) from error
    network = PolicyNetwork(ConditionalUNet1D(widths, groups=groups), policy.observations)
    state = {f"unet.{name}": value for name, value in policy.state.items()}
    return Reading(network=network, spec=spec, state={**state, **policy.left})


def say(facts: Facts, name: str, value: T | None, default: T) -> T:
    """Notes what a configuration says; where it says nothing, asks, with a default."""
    return facts.ask(name, default) if value is None else facts.found(name, value, "config")


def finite(tensors: Mapping[str, Tensor], opened: Opened) -> None:
    """Checks numbers that are no weights.

    Raises:
        CheckpointError: Some of them are infinite, as LeRobot leaves those that nothing set.
    """
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{opened.path} has numbers that are not finite in {name}: what actions or "
                "observations are normalised with was never set.",
                hint="Take a checkpoint that training wrote, with its normalisation.",
            )


def restored(scale: Tensor, offset: Tensor) -> Restore:
    """Returns what samples mean: x · scale + offset, both float64."""
    return Restore(
        scale=tuple(map(float, scale.tolist())), offset=tuple(map(float, offset.tolist()))
    )


def _horizon(facts: Facts, value: Any, widths: UNet1DWidths, opened: Opened) -> int:
    if isinstance(value, int):
        horizon = facts.found("horizon", value, "config")
    else:
        horizon = facts.need(
            "horizon",
            int,
            why="That is the number of actions that are drawn at a time; the network takes any "
            f"multiple of {widths.multiple}.",
            hint="Type the one it was trained with: --set horizon=16",
        )
    if horizon < 1 or horizon % widths.multiple:
        raise CheckpointError(
            f"The horizon is {horizon}; {opened.path} halves it {len(widths.down) - 1} times, so "
            f"it takes multiples of {widths.multiple}.",
            hint=f"Type the one it was trained with: --set horizon={4 * widths.multiple}",
        )
    return horizon


def _conditions(
    policy: Policy, widths: UNet1DWidths, facts: Facts, opened: Opened
) -> tuple[Condition, ...]:
    if not widths.condition:
        facts.found("condition", "none")
        return ()
    if not policy.observations:
        facts.found("condition", f"global_cond, {widths.condition} numbers, as training gave them")
        return (_observation("global_cond", (widths.condition,)),)
    size = sum(o.size for o in policy.observations)
    steps = widths.condition // size
    if size * steps != widths.condition:
        sizes = ", ".join(f"{o.name} {o.size}" for o in policy.observations)
        raise CheckpointError(
            f"{opened.path} takes {widths.condition} numbers as its condition, which is no "
            f"multiple of an observation's: {sizes}.",
            hint="Is its configuration that of another training?",
        )
    said = policy.settings.get("n_obs_steps")
    if isinstance(said, int) and said != steps:
        raise CheckpointError(
            f"{opened.path} takes {steps} observations of {size} numbers; its configuration says "
            f"n_obs_steps {said}.",
            hint="Is its configuration that of another training?",
        )
    facts.found("n_obs_steps", steps)
    names = ", ".join(f"{o.name} ({steps}, {o.size})" for o in policy.observations)
    facts.found("condition", f"{names}, in their own units")
    return tuple(_observation(o.name, (steps, o.size)) for o in policy.observations)


def _observation(name: str, shape: tuple[int, ...]) -> Condition:
    return Condition(name=name, meaning="observation", dtype="float32", shape=shape)


_KINDS: Mapping[str, Sampler] = {
    "DDPMScheduler": "ddpm",
    "DDIMScheduler": "ddim",
    "DDPM": "ddpm",
    "DDIM": "ddim",
}
_VARIANCES: Mapping[str, Variance] = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
}
_POLICY_SCHEDULER: Mapping[str, Any] = {
    # What both projects' configurations begin with, where a file says nothing at all.
    "num_train_timesteps": 100,
    "beta_schedule": "squaredcos_cap_v2",
}


def _loop_of(config: Mapping[str, Any], facts: Facts, *, steps: int | None) -> dict[str, Any]:
    """Returns schedule, prediction, variance, clip and loop of diffusers' scheduler, for a spec.

    Args:
        config: Its settings; what is missing is at diffusers' default, or, of an empty one, at the
            projects'.
        facts: Where they go.
        steps: How many the policy takes.

    Raises:
        CheckpointError: There is no such scheduler here.
    """
    source: Source = "config" if config else "assumed"
    config = config or _POLICY_SCHEDULER
    kind = say(facts, "noise_scheduler", config.get("kind"), "DDPM")
    if kind not in _KINDS:
        _refuse_scheduler(
            kind, "DDPM and DDIM are supported", "Type another one: --set noise_scheduler=DDIM"
        )
    sampler = _KINDS[kind]
    for name in ("thresholding", "rescale_betas_zero_snr"):
        if config.get(name):
            _refuse_scheduler(f"{name}={config[name]}", "that is not supported")
    schedule = facts.schedule(lambda: trained_schedule(config, "this policy"), source=source)
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS and not facts.typed("prediction"):
        _refuse_scheduler(
            f"prediction_type={prediction}",
            f"there are {', '.join(PREDICTIONS)}",
            "Type what the network gives: --prediction epsilon",
        )
    prediction = facts.prediction(cast("Prediction", prediction), source=source)
    variance = config.get("variance_type", "fixed_small")
    if variance not in _VARIANCES:
        _refuse_scheduler(f"variance_type={variance}", f"there are {', '.join(_VARIANCES)}")
    clips = say(facts, "clip_sample", config.get("clip_sample"), default=True)
    limit = float(config.get("clip_sample_range", 1.0))
    if clips:
        limit = say(facts, "clip_sample_range", None if source == "assumed" else limit, 1.0)
    T = schedule.T  # noqa: N806
    count = say(facts, "num_inference_steps", steps, T)
    if not 1 <= count <= T:
        raise CheckpointError(
            f"num_inference_steps is {count}; the schedule has 1 to {T}.",
            hint=f"Type --set num_inference_steps={T}",
        )
    spacing = config.get("timestep_spacing", "leading")
    if spacing not in get_args(Spacing):
        _refuse_scheduler(
            f"timestep_spacing={spacing}", f"there are {', '.join(get_args(Spacing))}"
        )
    common = {
        "steps": None if count == T else count,
        "spacing": spacing,
        "offset": int(config.get("steps_offset", 0)),
    }
    if sampler == "ddpm":
        sampling = Sampling(**common, noise_at_end=True)
    else:
        sampling = Sampling(
            **common,
            eta=float(config.get("eta", 0.0)),
            direction="clipped" if config.get("use_clipped_model_output") else "network",
            previous="stride",
            final="clean" if config.get("set_alpha_to_one", True) else "first",
        )
    return {
        "schedule": schedule,
        "prediction": prediction,
        "variance": _VARIANCES[variance],
        "clip": limit if clips else None,
        "sampler": sampler,
        "sampling": sampling,
    }


def _refuse_scheduler(what: str, there: str, hint: str = "See docs/checkpoints.md") -> NoReturn:
    raise CheckpointError(f"Its noise scheduler is {what}; {there}.", hint=hint)
