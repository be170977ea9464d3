"""Networks that Hugging Face diffusers saved as UNet2DModel."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ddpm_deploy.errors import CheckpointError
from ddpm_deploy.model.diffusers_folder import CONFIG, config_beside, open_folder, unwrap
from ddpm_deploy.model.diffusers_scheduler import read_scheduler, setting
from ddpm_deploy.model.facts import Facts
from ddpm_deploy.model.family import Family, Opened, Reading, State, count_parts, label_condition
from ddpm_deploy.model.unet2d import (
    ACTIVATIONS,
    Block,
    UNet2D,
    UNet2DSettings,
    timestep_frequencies,
)
from ddpm_deploy.spec import ModelSpec

_DOWN = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
_UP = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")
_OLD_ATTENTION = re.compile(r"(attentions\.\d+)\.(query|key|value|proj_attn)\.")
_NEW_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _read(opened: Opened, facts: Facts) -> Reading:
    configs, files = opened.config, tuple[Path, ...]()
    if "unet" not in configs:
        configs, files = config_beside(opened.path)
    if "unet" not in configs:
        raise CheckpointError(
            f"{opened.path} holds the weights of a diffusers UNet2DModel and not its config: the "
            "number of heads, the groups, the eps and the timestep embedding are in no weight.",
            hint=f"Put the {CONFIG} that was saved with it beside it: "
            f"{opened.path.parent / CONFIG}",
        )
    config = configs["unet"]
    state = {_current_name(name): tensor for name, tensor in opened.state.items()}
    _check_kind(config, opened)
    settings = _settings(config, state, facts, opened)
    shift = _config(facts, config, "freq_shift", 0)
    size = _size(config)
    shape = facts.image_size(size, source="config", multiple_of=2 ** (len(settings.widths) - 1))
    learned = settings.out_channels == 2 * settings.channels
    if settings.out_channels != settings.channels and not learned:
        raise CheckpointError(
            f"{opened.path} takes {settings.channels} channels and gives {settings.out_channels}: "
            "it is conditioned by a picture that stands beside x.",
            hint="Networks that give as many channels as they take can be exported.",
        )
    loop = read_scheduler(
        configs.get("scheduler", {}),
        str(configs.get("pipeline", {}).get("_class_name", "")),
        facts,
        learned=learned,
        source=str(opened.path),
    )
    spec = ModelSpec(
        sample_shape=(settings.channels, *shape),
        schedule=loop.schedule,
        prediction=loop.prediction,
        variance=loop.variance,
        clip=loop.clip,
        rounding="nearest",
        sampler=loop.sampler,
        sampling=loop.sampling,
        family="diffusers",
    )
    if settings.classes:
        null = _null_label(facts, settings.classes)
        spec = replace(spec, conditions=(label_condition(settings.classes, null=null),))
    network = UNet2D(settings, timestep_frequencies(settings.widths[0], shift))
    return Reading(network=network, spec=spec, state=state, files=files)


def _null_label(facts: Facts, classes: int) -> int | None:
    null: Any = facts.ask("null_label", None)
    if null is not None and null not in range(classes):
        raise CheckpointError(
            f"--set null_label is {null}; the labels are 0 to {classes - 1}.",
            hint="Leave it out where training never left the label away.",
        )
    return null if null is None else int(null)


def _current_name(name: str) -> str:
    """Returns a tensor's name as it is since diffusers 0.17; attention had others before."""
    return _OLD_ATTENTION.sub(lambda found: f"{found[1]}.{_NEW_ATTENTION[found[2]]}.", name)


def _check_kind(config: Mapping[str, Any], opened: Opened) -> None:
    """Refuses what a UNet2DModel may be and this network is not."""
    for name, known in [
        ("time_embedding_type", ("positional",)),
        ("resnet_time_scale_shift", ("default", "scale_shift")),
        ("class_embed_type", (None,)),
        ("mid_block_type", ("UNetMidBlock2D", None)),
        ("downsample_type", ("conv", "resnet", None)),
        ("upsample_type", ("conv", "resnet", None)),
        ("act_fn", tuple(ACTIVATIONS)),
    ]:
        value = config.get(name, known[0])
        if value not in known:
            raise CheckpointError(
                f"The network of {opened.path} has the {name} {value!r}, which is not supported; "
                f"supported: {', '.join(map(str, known))}.",
                hint="See docs/checkpoints.md",
            )
    for name, types in [("down_block_types", _DOWN), ("up_block_types", _UP)]:
        for block in config.get(name, ()):
            if _block_name(block) not in types:
                raise CheckpointError(
                    f"The network of {opened.path} has a {block} among its {name}, which is not "
                    f"supported; supported: {', '.join(types)}.",
                    hint="See docs/checkpoints.md",
                )


def _block_name(block: object) -> str:
    return str(block).removeprefix("UNetRes")


def _settings(
    config: Mapping[str, Any], state: State, facts: Facts, opened: Opened
) -> UNet2DSettings:
    """Reads what the weights show off them, and the rest off the config."""
    levels = count_parts(state, "down_blocks.{}.resnets.0.conv1.weight")
    widths = tuple(
        int(state[f"down_blocks.{i}.resnets.0.conv1.weight"].shape[0]) for i in range(levels)
    )
    layers = count_parts(state, "down_blocks.0.resnets.{}.conv1.weight")
    labels = state.get("class_embedding.weight")
    # A level that does not go on has no resampler, and so its kind means nothing.
    down = tuple(_block(state, f"down_blocks.{i}", "downsamplers") for i in range(levels))
    up = tuple(_block(state, f"up_blocks.{i}", "upsamplers") for i in range(levels))
    middle = "mid_block.resnets.0.conv1.weight" in state
    found: dict[str, Any] = {
        "in_channels": int(state["conv_in.weight"].shape[1]),
        "out_channels": int(state["conv_out.weight"].shape[0]),
        "block_out_channels": widths,
        "layers_per_block": layers,
        "down_block_types": tuple(_type(block, _DOWN) for block in down),
        "up_block_types": tuple(_type(block, _UP) for block in up),
        "num_class_embeds": 0 if labels is None else int(labels.shape[0]),
    }
    _check_agreement(config, found, opened)
    for name, value in found.items():
        facts.found(name, value)
    projection = state["down_blocks.0.resnets.0.time_emb_proj.weight"]
    scale_shift = facts.found(
        "resnet_time_scale_shift",
        "scale_shift" if int(projection.shape[0]) == 2 * widths[0] else "default",
    )
    middle_attention = facts.found("add_attention", "mid_block.attentions.0.to_q.weight" in state)
    shown = {"resnet_time_scale_shift": scale_shift, "add_attention": middle_attention}
    for name, value in shown.items():
        if config.get(name, value) != value and config.get("mid_block_type", "") is not None:
            raise _disagrees(opened, name, config[name], value)
    groups = _config(facts, config, "norm_num_groups", 32)
    middle_groups = None
    if middle_attention:
        middle_groups = _config(facts, config, "attn_norm_num_groups", None)
        if middle_groups is None and scale_shift == "default":
            middle_groups = groups
    return UNet2DSettings(
        channels=found["in_channels"],
        out_channels=found["out_channels"],
        widths=widths,
        layers=layers,
        down=down,
        up=up,
        classes=found["num_class_embeds"],
        time=int(state["time_embedding.linear_1.weight"].shape[0]),
        head_dim=_config(facts, config, "attention_head_dim", 8),
        groups=groups,
        middle_groups=middle_groups,
        eps=_config(facts, config, "norm_eps", 1e-5),
        padding=_config(facts, config, "downsample_padding", 1),
        activation=_config(facts, config, "act_fn", "silu"),
        scale_shift=scale_shift == "scale_shift",
        middle=middle,
        middle_attention=middle_attention,
        middle_scale=_config(facts, config, "mid_block_scale_factor", 1.0),
        center=_config(facts, config, "center_input_sample", False),
        cosine_first=_config(facts, config, "flip_sin_to_cos", True),
    )


def _size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Returns height and width, None where the config leaves them out."""
    size = config.get("sample_size")
    if size is None:
        return None
    sides = [size, size] if isinstance(size, int) else size
    whole = isinstance(sides, list) and all(type(side) is int and side > 0 for side in sides)
    if not whole or len(sides) != 2:
        raise CheckpointError(
            f"Its config says sample_size {size!r}; it is a side, or height and width.",
            hint="Correct it there: 32, or [16, 24]",
        )
    return sides[0], sides[1]


def _config(facts: Facts, config: Mapping[str, Any], name: str, default: Any) -> Any:
    """Returns what the config says, or diffusers' default where it leaves a name out.

    Raises:
        CheckpointError: It says what cannot be.
    """
    value: Any = None
    if name not in _NULL or name not in config or config[name] is not None:
        value = setting(config, name, default, of="its network")
    value = facts.found(name, value, "config")
    least, most = _LIMITS.get(name, (-math.inf, math.inf))
    if isinstance(value, int | float) and not least <= value <= most:
        raise CheckpointError(
            f"Its {name} is {value}; there is {least:g} to {most:g}.",
            hint=f"Type the one of training: --set {name}={default}",
        )
    return value


_NULL = {"attention_head_dim", "attn_norm_num_groups"}
"""Settings whose null says something of its own: one head, the groups of the other norms."""

_LIMITS = {
    "attention_head_dim": (1, math.inf),
    "norm_num_groups": (1, math.inf),
    "norm_eps": (1e-12, 0.1),
    "downsample_padding": (0, 1),
    "mid_block_scale_factor": (1e-3, 1e3),
}


def _check_agreement(config: Mapping[str, Any], found: Mapping[str, Any], opened: Opened) -> None:
    for name, value in found.items():
        if name not in config:
            continue
        said, shown = config[name], value
        if name.endswith("_types"):  # attention alone: a setting of its own says how they resample
            said, shown = (["Attn" in str(block) for block in blocks] for blocks in (said, value))
        if said != (list(shown) if isinstance(shown, tuple | list) else shown or None):
            raise _disagrees(opened, name, config[name], value)


def _disagrees(opened: Opened, name: str, said: object, shown: object) -> CheckpointError:
    return CheckpointError(
        f"The {CONFIG} of {opened.path} says {name} {said!r}, and the weights have {shown!r}.",
        hint="Is it another model's? Copy the one that was saved with these weights.",
    )


def _block(state: State, level: str, resampler: str) -> Block:
    return Block(
        attention=any(name.startswith(f"{level}.attentions.0.") for name in state),
        resample="resnet" if f"{level}.{resampler}.0.conv1.weight" in state else "conv",
    )


def _type(block: Block, types: tuple[str, str, str]) -> str:
    plain, attention, resnet = types
    if block.attention:
        return attention
    return resnet if block.resample == "resnet" else plain


DIFFUSERS = Family(
    name="diffusers",
    has_all=(
        "conv_in.weight",
        "time_embedding.linear_1.weight",
        "down_blocks.0.resnets.0.conv1.weight",
        "conv_norm_out.weight",
    ),
    has_none=("transformer_blocks", "attn2", "add_embedding", "encoder.", "quant_conv"),
    read=_read,
    unwrap=unwrap,
    open_folder=open_folder,
)
