"""The checkpoint families: which keys tell one, and what network its weights make.

A family is told by the names of its tensors alone; every width is then read off their shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ddpm_deploy.errors import CheckpointError
from ddpm_deploy.model.unet import UNet, UNetWidths
from ddpm_deploy.schedule import linear
from ddpm_deploy.spec import Condition, ModelSpec

State = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of checkpoint.

    Attributes:
        name: As it is called in messages and in specs.
        marks: Keys that every file of the family has.
        build: Makes the network, untrained, in the shapes of a state dict.
        spec: What the family's files never say, by its own defaults: from the state dict and the
            image size, which is its default when None.
    """

    name: str
    marks: tuple[str, ...]
    build: Callable[[State], nn.Module]
    spec: Callable[[State, int | None], ModelSpec]


def _build_dome272(state: State) -> UNet:
    labels = state.get("label_emb.weight")
    return UNet(
        int(state["inc.double_conv.0.weight"].shape[1]),
        classes=0 if labels is None else int(labels.shape[0]),
        widths=UNetWidths.of(state),
        out_channels=int(state["outc.weight"].shape[0]),
    )


def _spec_dome272(state: State, image_size: int | None) -> ModelSpec:
    size = image_size or 64
    if size % 8:
        raise CheckpointError(
            f"The image size is {size}; this network halves it three times, so 8 must divide it.",
            hint="Type the size that it was trained at: --image-size 64",
        )
    channels = int(state["inc.double_conv.0.weight"].shape[1])
    labels = state.get("label_emb.weight")
    conditions: tuple[Condition, ...] = ()
    if labels is not None:
        conditions = (label_condition(int(labels.shape[0])),)
    return ModelSpec(
        sample_shape=(channels, size, size),
        schedule=linear(1000),
        variance="fixed_large",
        clip=None,
        rounding="truncate",
        first_timestep=1,
        sampler="dome272",
        conditions=conditions,
        family="dome272",
    )


def label_condition(classes: int, names: Sequence[str] = ()) -> Condition:
    """Returns the class label `y` of a `UNet`, whose null label is `classes`."""
    return Condition(
        name="y",
        meaning="class_label",
        dtype="int64",
        classes=classes,
        null=classes,
        names=tuple(names),
    )


DOME272 = Family(
    name="dome272",
    marks=(
        "inc.double_conv.0.weight",
        "down1.maxpool_conv.1.double_conv.0.weight",
        "down1.emb_layer.1.weight",
        "sa1.mha.in_proj_weight",
        "bot1.double_conv.0.weight",
        "up1.conv.0.double_conv.0.weight",
        "outc.weight",
    ),
    build=_build_dome272,
    spec=_spec_dome272,
)

FAMILIES: tuple[Family, ...] = (DOME272,)


def detect(state: State, *, source: str) -> Family:
    """Tells which family a state dict belongs to.

    Args:
        state: A state dict without wrapping prefixes.
        source: What to call the file in errors.

    Raises:
        CheckpointError: No family has these keys; names the nearest and what it would need.
    """
    for family in FAMILIES:
        if all(mark in state for mark in family.marks):
            return family
    nearest = max(FAMILIES, key=lambda family: sum(mark in state for mark in family.marks))
    missing = [mark for mark in nearest.marks if mark not in state]
    shown = ", ".join(list(state)[:3])
    raise CheckpointError(
        f"{source} is not a network that this release knows: its {len(state)} tensors begin with "
        f"{shown}. The nearest family is {nearest.name}, with {len(nearest.marks) - len(missing)} "
        f"of its {len(nearest.marks)} marks; missing: {', '.join(missing)}.",
        hint="Families: "
        + ", ".join(family.name for family in FAMILIES)
        + "; see docs/checkpoints.md",
    )
