"""Checkpoints of ermongroup/ddim, pesser/pytorch_diffusion and other ports of Ho et al.'s network.

The network is the one that diffusers has, under other names: see `unet2d`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor

from ddpm_deploy.errors import CheckpointError
from ddpm_deploy.model.facts import Facts
from ddpm_deploy.model.family import Family, Opened, Reading, State, Weights, count_parts
from ddpm_deploy.model.unet2d import Block, UNet2D, UNet2DSettings
from ddpm_deploy.model.wrapping import choose_weights, strip_prefixes
from ddpm_deploy.sampling import Sampling, Variance
from ddpm_deploy.schedule import linear
from ddpm_deploy.spec import ModelSpec, Rounding

CIFAR10 = (128, 256, 256, 256)
"""The widths of the one published network whose σ² is β."""

_HAS_ALL = (
    "temb.dense.0.weight",
    "conv_in.weight",
    "down.0.block.0.conv1.weight",
    "mid.attn_1.q.weight",
    "up.0.block.0.conv1.weight",
    "norm_out.weight",
    "conv_out.weight",
)
_RENAMED: tuple[tuple[str, str], ...] = (
    (r"^temb\.dense\.0\.", "time_embedding.linear_1."),
    (r"^temb\.dense\.1\.", "time_embedding.linear_2."),
    (r"^norm_out\.", "conv_norm_out."),
    (r"^down\.(\d+)\.", r"down_blocks.\1."),
    (r"^mid\.block_1\.", "mid_block.resnets.0."),
    (r"^mid\.attn_1\.", "mid_block.attentions.0."),
    (r"^mid\.block_2\.", "mid_block.resnets.1."),
    (r"\.block\.(\d+)\.", r".resnets.\1."),
    (r"\.attn\.(\d+)\.", r".attentions.\1."),
    (r"\.downsample\.", ".downsamplers.0."),
    (r"\.upsample\.", ".upsamplers.0."),
    (r"\.temb_proj\.", ".time_emb_proj."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
)


def _unwrap(content: Any, path: Path, weights: Weights | None) -> Opened | None:
    """Takes the weights out of ddim's list: model, optimizer, epoch, step and, last, the EMA."""
    if not isinstance(content, list | tuple) or len(content) not in {4, 5}:
        return None
    raw: dict[Weights, Any] = {"online": content[0], "ema": content[-1]}
    found: dict[Weights, State] = {
        kind: strip_prefixes(state) for kind, state in raw.items() if isinstance(state, Mapping)
    }
    if any(name not in found.get("online", {}) for name in _HAS_ALL):
        return None
    taken = choose_weights(found, path, weights)
    return Opened(
        path=path,
        state=found[taken],
        weights=taken,
        choices=tuple(found),
        content=content,
        files=(path,),
    )


def _read(opened: Opened, facts: Facts) -> Reading:
    # logvar is of a variant of the training that nothing uses when it samples.
    state = {name: tensor for name, tensor in opened.state.items() if name != "logvar"}
    levels = count_parts(state, "down.{}.block.0.conv1.weight")
    widths = tuple(int(state[f"down.{i}.block.0.conv1.weight"].shape[0]) for i in range(levels))
    first = int(state["conv_in.weight"].shape[0])
    if levels > 1 and "down.0.downsample.conv.weight" not in state:
        raise CheckpointError(
            f"{opened.path} was trained with resamp_with_conv false: it halves by averages.",
            hint="Networks that halve by a convolution can be exported, as the published ones do.",
        )
    attention = tuple(f"down.{i}.attn.0.q.weight" in state for i in range(levels))
    channels = facts.found("in_channels", int(state["conv_in.weight"].shape[1]))
    out = facts.found("out_channels", int(state["conv_out.weight"].shape[0]))
    if channels != out:
        raise CheckpointError(
            f"{opened.path} takes {channels} channels and gives {out}.",
            hint="Networks that give as many channels as they take can be exported.",
        )
    facts.found("ch", first)
    facts.found("widths", widths)
    layers = facts.found("num_res_blocks", count_parts(state, "down.0.block.{}.conv1.weight"))
    facts.found("attention_levels", ",".join(str(i) for i in range(levels) if attention[i]))
    groups = facts.ask("norm_num_groups", 32)
    settings = UNet2DSettings(
        channels=channels,
        out_channels=out,
        widths=widths,
        first=0 if first == widths[0] else first,
        layers=layers,
        down=tuple(Block(attention=each) for each in attention),
        up=tuple(Block(attention=each) for each in reversed(attention)),
        time=int(state["temb.dense.0.weight"].shape[0]),
        head_dim=None,
        groups=groups,
        middle_groups=groups,
        eps=facts.ask("norm_eps", 1e-6),
        padding=0,
        cosine_first=False,
    )
    shape = facts.image_size(None, multiple_of=2 ** (levels - 1))
    spec = _spec(opened, facts, (channels, *shape), widths)
    return Reading(
        network=UNet2D(settings, _frequencies(first)),
        spec=spec,
        state={_renamed(name, levels): _flat(name, tensor) for name, tensor in state.items()},
    )


def _spec(
    opened: Opened, facts: Facts, shape: tuple[int, ...], widths: tuple[int, ...]
) -> ModelSpec:
    """Says how ddim samples, whose files are lists, or pytorch_diffusion, whose are bare."""
    ddims = isinstance(opened.content, list | tuple)
    schedule, prediction = facts.schedule(linear(1000)), facts.prediction("epsilon")
    large = ddims or widths == CIFAR10
    sampler = facts.ask("sampler", "ddim" if ddims else "ddpm", among=("ddpm", "ddim"))
    clips = facts.ask("clip_sample", sampler == "ddpm")
    variance = facts.ask(
        "variance",
        "fixed_large" if large else "fixed_small",
        among=("fixed_small", "fixed_large"),
    )
    rounding = facts.ask("rounding", "nearest" if ddims else "truncate", among=get_args(Rounding))
    return ModelSpec(
        sample_shape=shape,
        schedule=schedule,
        prediction=prediction,
        variance=cast("Variance", variance),
        clip=1.0 if clips else None,
        rounding=cast("Rounding", rounding),
        sampler="ddim" if sampler == "ddim" else "ddpm",
        sampling=Sampling(direction="network" if sampler == "ddim" else "clipped"),
        family="ddim",
    )


def _frequencies(width: int) -> Tensor:
    """Returns the frequencies of the timestep embedding by the original's own expression."""
    half = width // 2
    step = math.log(10000) / (half - 1)
    return torch.exp(torch.arange(half, dtype=torch.float32) * -step)


def _renamed(name: str, levels: int) -> str:
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    # Levels on the way up are stored the finest first, and run the coarsest first.
    return re.sub(r"^up\.(\d+)\.", lambda up: f"up_blocks.{levels - 1 - int(up[1])}.", name)


def _flat(name: str, tensor: Tensor) -> Tensor:
    """Makes a matrix of the 1x1 convolutions that attention projects with."""
    projects = re.search(r"attn\w*\.(\d+\.)?(q|k|v|proj_out)\.weight$", name)
    return tensor.flatten(1) if projects and tensor.shape[2:] == (1, 1) else tensor


DDIM = Family(
    name="ddim",
    has_all=_HAS_ALL,
    has_none=("encoder.", "decoder.", "quant_conv", "transformer_blocks"),
    read=_read,
    unwrap=_unwrap,
)
