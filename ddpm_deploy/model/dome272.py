"""Checkpoints of dome272/Diffusion-Models-pytorch and its forks."""

from __future__ import annotations

from ddpm_deploy.errors import CheckpointError
from ddpm_deploy.model.facts import Facts
from ddpm_deploy.model.family import Family, Opened, Reading, label_condition
from ddpm_deploy.model.unet import HEADS, UNet, UNetWidths
from ddpm_deploy.schedule import linear
from ddpm_deploy.spec import ModelSpec


def _read(opened: Opened, facts: Facts) -> Reading:
    state = opened.state
    labels = state.get("label_emb.weight")
    widths = UNetWidths.of(state)
    channels = facts.found("channels", int(state["inc.double_conv.0.weight"].shape[1]))
    classes = facts.found("classes", 0 if labels is None else int(labels.shape[0]))
    facts.found("widths", str(widths))
    heads = facts.ask("heads", HEADS, least=1)
    size = facts.image_size((64, 64), multiple_of=8)
    schedule = facts.schedule(linear(1000))
    if schedule.T == 1:
        raise CheckpointError(
            "The schedule has 1 timestep; networks of dome272 are trained from t = 1 on.",
            hint="Type the T of training: --timesteps 1000",
        )
    prediction = facts.prediction("epsilon")
    network = UNet(
        channels,
        classes=classes,
        widths=widths,
        out_channels=int(state["outc.weight"].shape[0]),
        heads=heads,
    )
    spec = ModelSpec(
        sample_shape=(channels, *size),
        schedule=schedule,
        prediction=prediction,
        variance="fixed_large",
        clip=None,
        rounding="truncate",
        first_timestep=1,
        sampler="dome272" if prediction == "epsilon" else "ddpm",
        conditions=(label_condition(classes),) if classes else (),
        family="dome272",
    )
    return Reading(network=network, spec=spec)


DOME272 = Family(
    name="dome272",
    has_all=(
        "inc.double_conv.0.weight",
        "down1.maxpool_conv.1.double_conv.0.weight",
        "down1.emb_layer.1.weight",
        "sa1.mha.in_proj_weight",
        "bot1.double_conv.0.weight",
        "up1.conv.0.double_conv.0.weight",
        "outc.weight",
    ),
    read=_read,
)
