"""Checkpoints of lucidrains/denoising-diffusion-pytorch, 0.27.4 to 2.x: Unet and Unet1D."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ddpm_deploy.errors import CheckpointError
from ddpm_deploy.model.facts import Facts
from ddpm_deploy.model.family import Family, Opened, Reading, State
from ddpm_deploy.model.lucidrains_file import BUFFERS, own_weights, unwrap
from ddpm_deploy.model.lucidrains_schedule import (
    own_schedule,
    read_prediction,
    read_schedule,
    sigmoid,
)
from ddpm_deploy.model.lucidrains_unet import AttentionShape, LucidrainsUnet, UnetShape
from ddpm_deploy.sampling import Prediction, Sampler, Sampling
from ddpm_deploy.schedule import Schedule, cosine
from ddpm_deploy.spec import Condition, ModelSpec, Restore


@dataclass(frozen=True)
class _Code:
    """The code that trained a network: weights of the same names are computed with differently.

    Attributes:
        release: Its numbers, as far as they matter.
        axes: 2 for pictures, 1 for sequences.
    """

    release: tuple[int, ...]
    axes: int

    @property
    def layer_norm(self) -> bool:
        """The attentions' norm subtracts the mean, too."""
        return self.release < (1, 7)

    @property
    def standardise(self) -> Literal["add", "clamp", ""]:
        """The blocks' weights are standardised at every call; how ε keeps the variance off 0."""
        if self.release < (1, 7, 1):
            return "add"
        return "clamp" if self.release < (1, 7, 2) else ""

    @property
    def mean_values(self) -> bool:
        """Linear attention divides its values by the number of positions."""
        return self.axes == 2 and self.release < (1, 7, 4)

    @property
    def cosine(self) -> bool:
        """Full attention takes queries and keys as directions."""
        return (0, 27) <= self.release < (0, 28)

    @property
    def rederives(self) -> bool:
        """DDIM derives ε from the clipped x_0 also where the network gives ε."""
        return self.axes == 2 and self.release >= (1, 4, 2)

    @property
    def schedule(self) -> Schedule:
        """What GaussianDiffusion takes by default."""
        return cosine(1000) if self.axes == 1 or self.release < (1, 0, 1) else sigmoid(1000)

    @property
    def prediction(self) -> Prediction:
        """Likewise."""
        return "epsilon" if self.axes == 1 or self.release < (1, 6, 3) else "v_prediction"


def _read(opened: Opened, facts: Facts) -> Reading:
    source = str(opened.path)
    buffers = {name: tensor for name, tensor in opened.state.items() if name in BUFFERS}
    raw = {name: tensor for name, tensor in opened.state.items() if name not in BUFFERS}
    axes = _axes(raw, source)
    code = _Code(_release(opened, facts, axes), axes)
    weights = own_weights(raw, axes=axes, standardise=code.standardise)
    shape = _shape(weights, facts, code, source)
    size = _size(facts, shape)
    schedule = _schedule(buffers, facts, code, source)
    prediction = _prediction(buffers, facts, schedule, shape, code)
    sampler, sampling = _sampling(facts, schedule, prediction, code)
    normalised = facts.ask("auto_normalize", default=True)
    sample_shape = (shape.channels, *size)
    seen = Condition(
        name="self_cond", meaning="self_condition", dtype="float32", shape=sample_shape
    )
    spec = ModelSpec(
        sample_shape=sample_shape,
        schedule=schedule,
        prediction=prediction,
        variance="learned_range" if shape.out_channels > shape.channels else "fixed_small",
        # Without its normalisation, pictures stay as they were read: 0 to 1.
        value_range=(-1.0, 1.0) if normalised else (0.0, 1.0),
        sampler=sampler,
        sampling=sampling,
        conditions=(seen,) if shape.self_condition else (),
        restore=Restore(scale=(0.5,), offset=(0.5,)) if axes == 1 and normalised else None,
        family="lucidrains",
    )
    return Reading(network=LucidrainsUnet(shape), spec=spec, state=weights)


def _axes(raw: State, source: str) -> int:
    """Returns 2 for pictures, 1 for sequences."""
    kernel = raw["init_conv.weight"]
    if kernel.ndim not in {3, 4}:
        raise CheckpointError(
            f"{source} is a video UNet, by its init_conv.weight of shape {tuple(kernel.shape)}.",
            hint="Pictures and sequences can be exported: Unet and Unet1D.",
        )
    width, embedded = raw["downs.0.0.block1.proj.weight"], raw["downs.0.0.mlp.1.weight"]
    if len(embedded) == len(width):
        raise CheckpointError(
            f"{source} is a UNet from before release 0.16 of denoising-diffusion-pytorch, or of "
            "Hugging Face's notebook: its blocks are shifted by the timestep and not scaled.",
            hint="Train it again with a release since 0.27.4.",
        )
    return kernel.ndim - 2


def _release(opened: Opened, facts: Facts, axes: int) -> tuple[int, ...]:
    """Returns the release that trained a network, as far as its arithmetic depends on it."""
    state = opened.state
    if "mid_block1.block1.norm.g" in state:
        facts.found("release", "2.0 or later")
        return (2, 0)
    if "mid_attn.to_qkv.weight" in state:
        memory = "mid_attn.mem_kv" in state
        facts.found("release", "1.9 to 1.11" if memory else "1.8")
        return (1, 9) if memory else (1, 8)
    version = opened.content.get("version") if isinstance(opened.content, Mapping) else None
    if isinstance(version, str):
        text = facts.found("release", version, "config")
    else:
        text = facts.ask("release", _likely_release(state, axes))
    release = tuple(int(number) for number in re.findall(r"\d+", text))
    least, most = ("0.27.4", "1.11.1") if axes == 1 else ("0.27.4", "1.7.7")
    if not release or release >= ((1, 12) if axes == 1 else (1, 8)):
        raise CheckpointError(
            f"{opened.path} has the names of releases {least} to {most}; it is not of {text}.",
            hint="Type the release that trained it: --set release=1.6.2",
        )
    return release


def _likely_release(state: State, axes: int) -> str:
    """Returns the latest release of those that most likely trained a network."""
    if axes == 2 and {"downs.0.3.weight", "downs.1.3.weight"} <= state.keys():
        return "0.31.1"
    if "p2_loss_weight" in state:
        return "1.4.1"
    return "1.11.1" if axes == 1 else "1.6.2"


def _shape(state: State, facts: Facts, code: _Code, source: str) -> UnetShape:
    """Reads the network's shape off its weights, and asks for what they do not show."""

    def out(name: str) -> int:
        return int(state[f"{name}.weight"].shape[0])

    levels = len({name.split(".")[1] for name in state if name.startswith("downs.")})
    dim = facts.found("dim", out("time_mlp.1") // 4)
    widths = (out("init_conv"), *(out(f"downs.{level}.3") for level in range(levels)))
    facts.found("init_dim", widths[0])
    facts.found("dim_mults", tuple(width // dim for width in widths[1:]))
    taken, given = int(state["init_conv.weight"].shape[1]), out("final_conv")
    if taken not in {given, 2 * given} and given != 2 * taken:
        raise CheckpointError(
            f"{source} takes {taken} channels and gives {given}: neither as many, nor twice as "
            "many on one side.",
            hint="Networks with an out_dim of their own, or further inputs, cannot be exported.",
        )
    channels = facts.found("channels", min(taken, given))
    self_condition = facts.found("self_condition", taken == 2 * given)
    facts.found("learned_variance", given == 2 * taken)
    groups = 0
    if "mid_block1.block1.norm.g" not in state:
        groups = facts.ask("resnet_block_groups", 8)
        if groups < 1 or any(width % groups for width in widths):
            raise CheckpointError(
                f"{source} has blocks of {', '.join(map(str, widths))} channels, which do not "
                f"split into {groups} groups.",
                hint="Type the groups that it was trained with: --set resnet_block_groups=4",
            )
    *attention, middle = _attention(state, facts, levels, code.axes, source)
    return UnetShape(
        channels=channels,
        out_channels=given,
        dim=dim,
        widths=widths,
        attention=tuple(attention),
        middle=middle,
        axes=code.axes,
        self_condition=self_condition,
        groups=groups,
        layer_norm=code.layer_norm,
        mean_values=code.mean_values,
        cosine=code.cosine,
        stride_kernel=int(state["downs.0.3.weight"].shape[-1]) if levels > 1 else 2,
        theta=facts.ask("theta", 10000) if code.release >= (1, 8) else 10000,
    )


def _attention(
    state: State, facts: Facts, levels: int, axes: int, source: str
) -> list[AttentionShape]:
    """Returns the attention of each level, and of the middle."""
    names = [*(f"downs.{level}.2" for level in range(levels)), "mid_attn"]
    full = [f"{name}.to_out.weight" in state for name in names]
    facts.found("full_attn", tuple(full[:-1]))
    inner = [int(state[f"{name}.to_qkv.weight"].shape[0]) // 3 for name in names]
    if "mid_attn.mem_kv" in state:
        memories = [state[f"{name}.mem_kv"].shape for name in names]
        heads = [int(shape[1]) for shape in memories]
        facts.found("heads", tuple(heads[:-1]))
        kept = [int(shape[2 if f else 3]) for shape, f in zip(memories, full, strict=True)]
    else:
        asked = facts.ask("heads", (4,))
        if axes == 1 and len(asked) == 1:
            heads = [*[4] * levels, *asked]  # Unet1D's linear attentions always have 4
        else:
            heads = list(asked * (levels if len(asked) == 1 else 1))
            heads.append(heads[-1])
        if len(heads) != len(names) or any(
            h < 1 or width % h for h, width in zip(heads, inner, strict=False)
        ):
            raise CheckpointError(
                f"{source} has attentions of {', '.join(map(str, inner))} channels, the last in "
                f"the middle, which do not split into {', '.join(map(str, heads))} heads.",
                hint="Type the heads that it was trained with, one number or one for each level: "
                "--set heads=4",
            )
        kept = [0] * len(names)
    return [
        AttentionShape(full=f, heads=h, width=width // h, memory=memory)
        for f, h, width, memory in zip(full, heads, inner, kept, strict=True)
    ]


def _size(facts: Facts, shape: UnetShape) -> tuple[int, ...]:
    return facts.image_size(
        None,
        multiple_of=2 ** (len(shape.attention) - 1),
        axes=shape.axes,
        called="image size" if shape.axes == 2 else "length",
    )


def _schedule(buffers: State, facts: Facts, code: _Code, source: str) -> Schedule:
    if not buffers:
        return facts.schedule(code.schedule, adapt=own_schedule)
    if "betas" not in buffers:
        raise CheckpointError(
            f"{source} has the buffers of a GaussianDiffusion, but no betas.",
            hint="Save it whole: torch.save(diffusion.state_dict(), 'diffusion.pt')",
        )
    shape = buffers["betas"].shape
    for name, buffer in buffers.items():
        if buffer.shape != shape or len(shape) != 1:
            raise CheckpointError(
                f"{source} has {name} of shape {tuple(buffer.shape)} and betas of "
                f"{tuple(shape)}; both have one number a timestep.",
                hint="Copy it again from where it was trained.",
            )
    return facts.schedule(read_schedule(buffers), source="weights")


def _prediction(
    buffers: State, facts: Facts, schedule: Schedule, shape: UnetShape, code: _Code
) -> Prediction:
    if shape.out_channels > shape.channels:
        # LearnedGaussianDiffusion takes the output for ε, whatever its objective is called.
        return facts.prediction("epsilon", source="weights")
    weight = buffers.get("loss_weight")
    read = None if weight is None else read_prediction(weight, schedule)
    if read is None:
        return facts.prediction(code.prediction)
    return facts.prediction(read, source="weights")


def _sampling(
    facts: Facts, schedule: Schedule, prediction: Prediction, code: _Code
) -> tuple[Sampler, Sampling]:
    # Before release 0.28 DDIM went otherwise.
    steps = schedule.T if code.cosine else facts.ask("sampling_timesteps", schedule.T)
    if not 1 <= steps <= schedule.T:
        raise CheckpointError(
            f"sampling_timesteps is {steps}; this schedule has 1 to {schedule.T}.",
            hint="Leave it out, or type --set sampling_timesteps=50",
        )
    if steps == schedule.T:
        return "ddpm", Sampling(spacing="trailing_floor")
    eta = facts.ask("ddim_sampling_eta", 1.0 if code.release < (1, 0) else 0.0)
    clipped = prediction != "epsilon" or code.rederives
    return "ddim", Sampling(
        steps=steps,
        eta=eta,
        spacing="trailing_floor",
        direction="clipped" if clipped else "network",
    )


LUCIDRAINS = Family(
    name="lucidrains",
    has_all=(
        "init_conv.weight",
        "time_mlp.1.weight",
        "downs.0.0.block1.proj.weight",
        "mid_block1.block1.proj.weight",
        "final_conv.weight",
    ),
    # Its relatives, which `foreign` knows by name.
    has_none=(
        *("classes_emb", "time_mlp.0.weights", "time_rel_pos_bias", "temporal_attn"),
        *(".fn.norm.weight", ".fn.norm.b", ".ds_conv."),
    ),
    read=_read,
    unwrap=unwrap,
)
