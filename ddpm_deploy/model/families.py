"""The registry of checkpoint families, and which of them a checkpoint is."""

from __future__ import annotations

from ddpm_deploy.errors import CheckpointError
from ddpm_deploy.model.ddim_port import DDIM
from ddpm_deploy.model.diffusers import DIFFUSERS
from ddpm_deploy.model.diffusion_policy import DIFFUSION_POLICY
from ddpm_deploy.model.dome272 import DOME272
from ddpm_deploy.model.family import Family, State
from ddpm_deploy.model.foreign import check_names
from ddpm_deploy.model.lerobot import LEROBOT
from ddpm_deploy.model.lucidrains import LUCIDRAINS
from ddpm_deploy.model.openai import OPENAI

FAMILIES: tuple[Family, ...] = (
    DOME272,
    DIFFUSERS,
    DDIM,
    OPENAI,
    LUCIDRAINS,
    DIFFUSION_POLICY,
    LEROBOT,
)


def detect(state: State, *, source: str, whole: State | None = None) -> Family:
    """Tells which family a state dict belongs to.

    Args:
        state: A state dict without wrapping prefixes.
        source: What to call the file in errors.
        whole: What it was taken from, under full names, which tell what else the file may be.

    Raises:
        CheckpointError: No family has these names, or two have; names what it is instead, or the
            nearest family and what it would need.
    """
    if whole:  # a network of pixels' names within a network of latents is none
        check_names(whole, source, around=True)
    found = [family for family in FAMILIES if family.matches(state)]
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(
            f"{source} could be of {' or of '.join(family.name for family in found)}: it has the "
            "marks of both.",
            hint="Save one network a file: torch.save(model.state_dict(), 'ckpt.pt')",
        )
    for names in (whole or {}, state):
        check_names(names, source)
    nearest = min(FAMILIES, key=lambda family: len(family.missing(state)) / len(family.has_all))
    missing, unwanted = nearest.missing(state), nearest.unwanted(state)
    there = len(nearest.has_all) - len(missing)
    shown = ", ".join(list(state)[:3])
    why = f"missing: {', '.join(missing)}" if missing else f"it has {unwanted[0]} besides"
    raise CheckpointError(
        f"{source} is not a network that this release knows: its {len(state)} tensors begin with "
        f"{shown}. The nearest family is {nearest.name}, with {there} of its "
        f"{len(nearest.has_all)} marks; {why}.",
        hint="Families: "
        + ", ".join(family.name for family in FAMILIES)
        + "; see docs/checkpoints.md. A network of your own: --model package.module:factory "
        "--spec spec.toml",
    )
