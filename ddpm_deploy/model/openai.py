"""Checkpoints of OpenAI's improved-diffusion and guided-diffusion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ddpm_deploy.errors import CheckpointError
from ddpm_deploy.model.facts import Facts
from ddpm_deploy.model.family import Family, Opened, Reading, label_condition
from ddpm_deploy.model.openai_unet import Heads, OpenAIUNet, Resample, UNetShape
from ddpm_deploy.respacing import respaced, respaced_sampler
from ddpm_deploy.sampling import Sampler, Sampling
from ddpm_deploy.schedule import Schedule, cosine, linear
from ddpm_deploy.spec import ModelSpec

Project = Literal["improved", "guided"]

PROJECTS: tuple[Project, ...] = ("improved", "guided")


@dataclass(frozen=True, kw_only=True)
class Release:
    """A file that OpenAI published, known by its shapes.

    Attributes:
        names: What the files with these shapes are called, without `.pt`.
        project: Whose it is.
        shape: What its weights show.
        size: Side of its images.
        heads: How its attention is split.
        schedule: Of its training.
        rescaled: Whether it was given t · 1000 / T.
        common: Whether the project's own defaults give these shapes, so that they say little: its
            name must fit, too.
    """

    names: tuple[str, ...]
    project: Project
    shape: UNetShape
    size: int
    heads: Heads
    schedule: Schedule
    rescaled: bool = False
    common: bool = False


def _shape(
    base: int,
    mult: tuple[float, ...],
    blocks: int,
    attention: tuple[int, ...],
    *,
    resample: Resample = "block",
    classes: int = 0,
    scale_shift: bool = True,
) -> UNetShape:
    """Returns the shape that OpenAI's flags give, with attention at levels of the image size."""
    return UNetShape(
        channels=3,
        out_channels=6,
        model_channels=base,
        widths=tuple(int(base * each) for each in mult),
        blocks=blocks,
        attention=tuple(level in attention for level in range(len(mult))),
        resample=resample,
        scale_shift=scale_shift,
        classes=classes,
    )


_64 = (1, 2, 3, 4)
_256 = (1, 1, 2, 2, 4, 4)

RELEASES: tuple[Release, ...] = (
    Release(
        names=("64x64_diffusion",),
        project="guided",
        shape=_shape(192, _64, 3, (1, 2, 3), classes=1000),
        size=64,
        heads=Heads(channels=64, new_order=True),
        schedule=cosine(1000),
    ),
    Release(
        names=("128x128_diffusion",),
        project="guided",
        shape=_shape(256, (1, 1, 2, 3, 4), 2, (2, 3, 4), classes=1000),
        size=128,
        heads=Heads(down=4, up=4),
        schedule=linear(1000),
    ),
    Release(
        names=("256x256_diffusion",),
        project="guided",
        shape=_shape(256, _256, 2, (3, 4, 5), classes=1000),
        size=256,
        heads=Heads(channels=64),
        schedule=linear(1000),
    ),
    Release(
        names=(
            "256x256_diffusion_uncond",
            "lsun_bedroom",
            "lsun_cat",
            "lsun_horse",
            "lsun_horse_nodropout",
        ),
        project="guided",
        shape=_shape(256, _256, 2, (3, 4, 5)),
        size=256,
        heads=Heads(channels=64),
        schedule=linear(1000),
    ),
    Release(
        names=("512x512_diffusion",),
        project="guided",
        shape=_shape(256, (0.5, 1, 1, 2, 2, 4, 4), 2, (4, 5, 6), classes=1000),
        size=512,
        heads=Heads(channels=64),
        schedule=linear(1000),
    ),
    Release(
        names=("imagenet64_uncond_100M_1500K", "imagenet64_uncond_vlb_100M_1500K"),
        project="improved",
        shape=_shape(128, _64, 3, (2, 3), resample="conv"),
        size=64,
        heads=Heads(down=4, up=4),
        schedule=cosine(4000),
        rescaled=True,
        common=True,
    ),
    Release(
        names=("cifar10_uncond_50M_500K", "cifar10_uncond_vlb_50M_500K"),
        project="improved",
        shape=_shape(128, (1, 2, 2, 2), 3, (1, 2), resample="conv"),
        size=32,
        heads=Heads(down=4, up=4),
        schedule=cosine(4000),
        rescaled=True,
        common=True,
    ),
    Release(
        names=("imagenet64_cond_270M_250K",),
        project="improved",
        shape=_shape(192, _64, 3, (2, 3), resample="conv", classes=1000),
        size=64,
        heads=Heads(down=4, up=4),
        schedule=cosine(4000),
    ),
    Release(
        names=("lsun_uncond_100M_1200K_bs128", "lsun_uncond_100M_2400K_bs64"),
        project="improved",
        shape=_shape(128, _256, 2, (4,), resample="conv", scale_shift=False),
        size=256,
        heads=Heads(down=1, up=1),
        schedule=linear(1000),
    ),
)
"""From the flags in the two projects' READMEs."""

_SIZES: Mapping[tuple[float, ...], int] = {
    (1, 2, 2, 2): 32,
    _64: 64,
    (1, 1, 2, 3, 4): 128,
    _256: 256,
    (0.5, 1, 1, 2, 2, 4, 4): 512,
}
"""The image sizes for which the projects choose these widths."""


def _read(opened: Opened, facts: Facts) -> Reading:
    shape = UNetShape.of(opened.state)
    learned = _note_shape(shape, opened.path, facts)
    release, near = _recognised(shape, opened.path, facts)
    project = _project(shape, facts, release)
    default = release.schedule if release else linear(1000)
    schedule = facts.schedule(
        default, source="release" if release else "assumed", adapt=_scaled_linear_range
    )
    _ask_for_all(_missing(shape, facts, release, project, schedule), near, opened.path)

    heads = _heads(shape, facts, release, opened.path, project)
    step = 2 ** (len(shape.widths) - 1)
    side = release.size if release else 64  # typed, where there is no release
    height, width = facts.image_size(
        (side, side), source="release" if release else "assumed", multiple_of=step
    )
    facts.found("attention_resolutions", tuple(height // ds for ds in shape.downsampled))
    rescaled = (
        facts.found("rescale_timesteps", release.rescaled, "release")
        if release
        else facts.ask("rescale_timesteps", project == "improved")
    )
    predicts_x0 = facts.typed("predict_xstart") and facts.ask("predict_xstart", False)
    prediction = facts.prediction("sample" if predicts_x0 else "epsilon")
    if predicts_x0 and prediction != "sample":
        raise CheckpointError(
            f"predict_xstart=true is --prediction sample, not {prediction}.",
            hint="Leave one of them out.",
        )
    small = not learned and facts.ask("sigma_small", False)
    null = _null_label(shape, facts) if shape.classes else None
    sampler, sampling = _loop(schedule, facts)
    network = OpenAIUNet(
        shape,
        heads=heads,
        steps=schedule.T if rescaled else None,
        zero_label=null == shape.classes,
    )
    spec = ModelSpec(
        sample_shape=(shape.channels, height, width),
        schedule=schedule,
        prediction=prediction,
        variance="learned_range" if learned else "fixed_small" if small else "fixed_large",
        clip=1.0,
        rounding="truncate",
        timestep="rescaled" if rescaled else "index",
        sampler=sampler,
        sampling=sampling,
        conditions=(label_condition(shape.classes, null=null),) if shape.classes else (),
        family="openai",
    )
    return Reading(network=network, spec=spec)


def _note_shape(shape: UNetShape, path: Path, facts: Facts) -> bool:
    """Notes what the weights show; returns whether they learned the variance.

    Raises:
        CheckpointError: It is a network of another kind.
    """
    given, out = shape.channels, shape.out_channels
    if given == 2 * out or given == out == 6:
        raise CheckpointError(
            f"{path} is a super-resolution network of OpenAI's: it takes {given} channels, the "
            "image and a smaller one made as large, which ddpm-deploy does not sample from.",
            hint="Give a network that takes the image alone.",
        )
    if out not in {given, 2 * given}:
        raise CheckpointError(
            f"{path} takes {given} channels and gives {out}; a network of this family gives as "
            f"many, or twice as many where it learns the variance.",
            hint="Is it a fork that changed the architecture? See docs/checkpoints.md",
        )
    facts.found("channels", given)
    facts.found("learn_sigma", out == 2 * given)
    facts.found("classes", shape.classes)
    facts.found("num_channels", shape.model_channels)
    facts.found("channel_mult", shape.mult)
    facts.found("num_res_blocks", shape.blocks)
    facts.found("use_scale_shift_norm", shape.scale_shift)
    facts.found("resblock_updown", shape.resample == "block")
    if shape.resample == "pool":
        facts.found("conv_resample", False)
    return out == 2 * given


def _recognised(
    shape: UNetShape, path: Path, facts: Facts
) -> tuple[Release | None, Release | None]:
    """Returns the release that a file is, and the one that it could be by its shapes alone."""
    fitting = next((each for each in RELEASES if each.shape == shape), None)
    if facts.typed("release"):
        known = [name for each in RELEASES for name in each.names]
        name = facts.ask("release", "none", among=(*known, "none"))
        if name == "none":
            return None, None
        if fitting is None or name not in fitting.names:
            raise CheckpointError(
                f"{path} has not the shapes of the released {name}.pt.",
                hint="Leave release out, or type --set release=none",
            )
        return fitting, fitting
    if fitting is None:
        return None, None
    # The longest first: one name begins as another does.
    by_length = sorted(fitting.names, key=len, reverse=True)
    named = next((name for name in by_length if path.name.startswith(name)), None)
    if fitting.common and named is None:
        return None, fitting
    facts.found("release", named or fitting.names[0], "release")
    return fitting, fitting


def _project(shape: UNetShape, facts: Facts, release: Release | None) -> Project | None:
    """Returns which of the two projects trained a network, where that is known."""
    if shape.resample != "conv" or shape.widths[0] != shape.model_channels:
        facts.found("project", "guided")  # improved-diffusion builds no such network
        return "guided"
    if facts.typed("project"):
        return facts.ask("project", "guided", among=PROJECTS)
    if release:
        return facts.found("project", release.project, "release")
    if _number(facts, "num_head_channels") or _new_order(facts):
        return facts.found("project", "guided", "flag")
    return None


def _number(facts: Facts, name: str) -> int | None:
    """Returns a number that was typed; -1 says nothing, as in OpenAI's flags."""
    number = facts.ask(name, -1) if facts.typed(name) else -1
    return None if number == -1 else number


def _new_order(facts: Facts) -> bool:
    return facts.typed("use_new_attention_order") and facts.ask("use_new_attention_order", False)


def _missing(
    shape: UNetShape,
    facts: Facts,
    release: Release | None,
    project: Project | None,
    schedule: Schedule,
) -> Iterator[tuple[str, str]]:
    """Yields what only the user can say and has not said, and what to type."""
    if release is not None:
        return
    down, each = _number(facts, "num_heads"), _number(facts, "num_head_channels")
    if down is None and each is None:
        yield (
            "how many heads its attention has (num_heads; or num_head_channels, where it was "
            "trained with that flag of guided-diffusion)",
            "--set num_heads=4",
        )
    single = each is None and down == 1 and _number(facts, "num_heads_upsample") in {None, 1}
    if not (facts.typed("use_new_attention_order") or project == "improved" or single):
        yield (
            "how attention orders queries, keys and values (use_new_attention_order, false "
            "unless that flag of guided-diffusion was given)",
            "--set use_new_attention_order=false",
        )
    if project is None and schedule.T != 1000 and not facts.typed("rescale_timesteps"):
        yield (
            f"whether it was given t in steps of 1000/{schedule.T} (rescale_timesteps, the default "
            "of improved-diffusion and not of guided-diffusion)",
            "--set project=improved",
        )
    if not facts.typed("image size"):
        yield "its image size", f"--image-size {_SIZES.get(shape.mult, 64)}"


def _ask_for_all(missing: Iterator[tuple[str, str]], near: Release | None, path: Path) -> None:
    """Asks for everything at once.

    Raises:
        CheckpointError: Something is missing.
    """
    asked = list(missing)
    if not asked:
        return
    hint = "Type what it was trained with, for instance: " + " ".join(text for _, text in asked)
    if near is not None:
        hint += (
            f"\nOr, if it is the released {near.names[0]}.pt, whose shapes it has: "
            f"--set release={near.names[0]}"
        )
    raise CheckpointError(
        f"{path} does not say {'; '.join(what for what, _ in asked)}. No weight depends on it, so "
        "a wrong value gives wrong pictures and no error.",
        hint=hint,
    )


def _heads(
    shape: UNetShape,
    facts: Facts,
    release: Release | None,
    path: Path,
    project: Project | None,
) -> Heads:
    """Returns how attention is split: what was typed, or the release's.

    Raises:
        CheckpointError: The network cannot be split so, or the project has no such thing.
    """
    own = release.heads if release else Heads()
    down, each = _number(facts, "num_heads"), _number(facts, "num_head_channels")
    up = _number(facts, "num_heads_upsample")
    if each is None and down is None and own.channels is not None:
        each = facts.found("num_head_channels", own.channels, "release")
    elif each is None:
        down = facts.found("num_heads", own.down, "release") if down is None else down
        if not facts.typed("num_heads_upsample"):
            up = facts.ask("num_heads_upsample", down)
        up = down if up is None else up
    new = own.new_order
    if release:
        new = facts.found("use_new_attention_order", new, "release")
    elif facts.typed("use_new_attention_order"):
        new = facts.ask("use_new_attention_order", False)
    if project == "improved" and (new or each is not None):
        what = "use_new_attention_order" if new else "num_head_channels"
        raise CheckpointError(
            f"improved-diffusion has no {what}.", hint="Leave it out, or type --set project=guided"
        )
    heads = Heads(
        down=1 if down is None else down, up=1 if up is None else up, channels=each, new_order=new
    )
    try:
        for width, there in zip(shape.widths, shape.attention, strict=True):
            if there:
                heads.of(width, up=False), heads.of(width, up=True)
        heads.of(shape.widths[-1], up=False)
    except ValueError as error:
        raise CheckpointError(
            f"{path} cannot have such attention: {error}.",
            hint="Type what it was trained with: --set num_heads=4",
        ) from error
    return heads


def _scaled_linear_range(schedule: Schedule) -> Schedule:
    """Returns the projects' own `linear` of so many steps: its β grow as T falls."""
    scale = 1000 / schedule.T
    if schedule != linear(schedule.T):
        return schedule
    return linear(schedule.T, start=scale * 0.0001, end=scale * 0.02)


def _null_label(shape: UNetShape, facts: Facts) -> int | None:
    """Returns the label that means none, which the originals have not.

    Raises:
        CheckpointError: There is no such label.
    """
    none: int | str | None = None
    null = facts.ask("null_label", none)
    if null in {None, "none"}:
        return None
    if null == "zero":
        return shape.classes
    if not isinstance(null, int) or not 0 <= null < shape.classes:
        raise CheckpointError(
            f"null_label is {null}; it is one of the labels 0..{shape.classes - 1} that was "
            "trained without a class, or zero, which adds a row of zeros.",
            hint="Type --set null_label=zero, or leave it out.",
        )
    return null


def _loop(schedule: Schedule, facts: Facts) -> tuple[Sampler, Sampling]:
    """Returns the loop that `respacing` asks for, or all steps.

    Raises:
        CheckpointError: The schedule cannot be respaced so.
    """
    name = "timestep_respacing" if facts.typed("timestep_respacing") else "respacing"
    text = facts.ask(name, "") if facts.typed(name) else ""
    if not text:
        return "ddpm", Sampling()
    try:
        steps = respaced(schedule.T, text)
    except ValueError as error:
        raise CheckpointError(f"{error}.", hint="Type --set respacing=100") from error
    return respaced_sampler(text) or "ddpm", Sampling(steps=steps)


OPENAI = Family(
    name="openai",
    has_all=(
        "time_embed.0.weight",
        "input_blocks.0.0.weight",
        "middle_block.0.in_layers.0.weight",
        "output_blocks.0.0.in_layers.0.weight",
        "out.2.weight",
    ),
    has_none=("transformer_blocks", "proj_in", "diffusion_model."),
    read=_read,
)
