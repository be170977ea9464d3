"""Checkpoints of real-stanford/diffusion_policy: workspaces, bare policies and bare UNets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ddpm_deploy.errors import CheckpointError
from ddpm_deploy.model.facts import Facts
from ddpm_deploy.model.family import Family, Opened, Reading, State, Weights
from ddpm_deploy.model.opening import damaged
from ddpm_deploy.model.policies import (
    MARKS,
    MODULES,
    Normalise,
    Observation,
    Policy,
    finite,
    read_policy,
    restored,
)
from ddpm_deploy.model.wrapping import choose_weights, strip_prefixes
from ddpm_deploy.spec import Restore

NAME = "diffusion_policy"

_PREFIXES = ("model.", "noise_pred_net.")  # in a policy, and in the project's notebook
_UNETS = tuple(f"{prefix}{MARKS[0]}" for prefix in _PREFIXES)
_TRANSFORMER = "model.input_emb.weight"
_STATES: Mapping[Weights, str] = {"ema": "ema_model", "online": "model"}
_ENCODERS = ("obs_encoder.", "rgb_nets_map.", "lowdim_net.", "vision_encoder.")
_UNUSED = ("mask_generator.", "_dummy_variable", "normalizer.")
_STEP_SETTINGS = ("eta", "use_clipped_model_output")
_LOCAL = "local_cond_encoder."
_MODULES = (*MODULES, _LOCAL)


def _unwrap(content: Any, path: Path, weights: Weights | None) -> Opened | None:
    if not isinstance(content, Mapping):
        return None
    states = content.get("state_dicts")
    if not isinstance(states, Mapping) or "cfg" not in content:
        names = [key for key in content if isinstance(key, str)]
        if not any(key.endswith((_TRANSFORMER, *_UNETS)) for key in names):
            return None
        if not any(key.endswith(_UNETS) for key in names):
            _check_unet(content, {}, path)
        state = strip_prefixes(content)
        taken = choose_weights({"online": state}, path, weights)
        return Opened(path=path, state=_bare(state), weights=taken, choices=("online",))
    config = content["cfg"] if isinstance(content["cfg"], Mapping) else {}
    found = {
        kind: states[name]
        for kind, name in _STATES.items()
        if isinstance(states.get(name), Mapping) and states[name]
    }
    if not found:
        raise CheckpointError(
            f"{path} is a workspace of diffusion_policy without a model; it has "
            f"{', '.join(map(str, states))[:200] or 'nothing'}.",
            hint="Take a checkpoint that training wrote: checkpoints/latest.ckpt",
        )
    taken = choose_weights(found, path, weights)
    _check_unet(found[taken], config, path)
    try:
        raw = dict(found[taken])
    except ValueError as error:
        raise damaged(path, str(error)[:300]) from error
    if wrong := [name for name, value in raw.items() if not isinstance(value, Tensor)]:
        raise damaged(path, f"its {wrong[0]} is no tensor")
    return Opened(
        path=path,
        state=_bare(raw),
        weights=taken,
        choices=tuple(found),
        content={},
        config=config,
    )


def _check_unet(names: Mapping[str, Any], config: Mapping[str, Any], path: Path) -> None:
    """Refuses the project's other policies by their names."""
    if any(name in names for name in _UNETS):
        return
    target = str(_at(config, "policy._target_") or _at(config, "_target_") or "").rpartition(".")[2]
    kind = "a transformer" if _TRANSFORMER in names else "no UNet of actions"
    raise CheckpointError(
        f"{path} is {target or 'a policy'} of diffusion_policy, {kind}; ddpm-deploy takes those "
        "that draw with ConditionalUnet1D.",
        hint="Take one that was trained with train_diffusion_unet_*_workspace.yaml.",
    )


def _bare(state: State) -> dict[str, Tensor]:
    """Takes the prefix of the UNet off its names."""
    return {
        next(
            (
                k[len(p) :]
                for p in _PREFIXES
                if k.startswith(p) and k[len(p) :].startswith(_MODULES)
            ),
            k,
        ): v
        for k, v in state.items()
    }


def _read(opened: Opened, facts: Facts) -> Reading:
    state, config = opened.state, opened.config
    unet = {k: v for k, v in state.items() if k.startswith(_MODULES)}
    encoder = sorted({k.split(".")[0] for k in state if k.startswith(_ENCODERS)})
    known = (*_MODULES, *_ENCODERS, *_UNUSED)
    fields = _normalizers(state, opened)
    _check_conditioning(opened, unet, fields)
    restore: Restore | None = None
    observations: tuple[Observation, ...] = ()
    if "action" in fields:
        scale, offset = (fields["action"][name].double() for name in ("scale", "offset"))
        restore = restored(1 / scale, -offset / scale)
    if fields and not encoder:
        observations = (_observation(fields, unet, config, opened),)
    normalised = [name for name in ("obs", "action") if name in fields]
    facts.remark("normalization", ", ".join(normalised) or "none in the file", "weights")
    settings, first = _settings(config)
    policy = Policy(
        state=unet,
        left={k: v for k, v in state.items() if not k.startswith(known)},
        settings=settings,
        first_action=first,
        observations=observations,
        outside=f"{', '.join(encoder)}: give global_cond what it gives" if encoder else "",
        scheduler=_scheduler(config),
        restore=restore,
    )
    return read_policy(policy, opened, facts, family=NAME)


def _normalizers(state: State, opened: Opened) -> dict[str, dict[str, Tensor]]:
    """Returns scale and offset of each field that the policy normalises."""
    prefix = "normalizer.params_dict."
    fields: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        field, _, what = key.removeprefix(prefix).rpartition(".")
        if key.startswith(prefix) and what in {"scale", "offset"}:
            fields.setdefault(field, {})[what] = value.detach().float().flatten()
    for field, numbers in fields.items():
        finite({f"normalizer.{field}.{name}": value for name, value in numbers.items()}, opened)
        if len({tuple(value.shape) for value in numbers.values()}) != 1 or len(numbers) != 2:
            raise CheckpointError(
                f"{opened.path} normalises {field} with {', '.join(numbers)}, which do not fit.",
                hint="Take a checkpoint that training wrote.",
            )
        if not bool((numbers["scale"] != 0).all()):
            raise CheckpointError(
                f"{opened.path} normalises {field} with a scale of 0.",
                hint="Take a checkpoint that training wrote.",
            )
    return fields


def _check_conditioning(
    opened: Opened, unet: State, fields: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Refuses policies that do not take their observations as one vector."""
    path = opened.path
    hint = "Train with obs_as_global_cond: True, as the project's own configurations do."
    if any(key.startswith(_LOCAL) for key in unet):
        raise CheckpointError(
            f"{path} takes its observations step by step (obs_as_local_cond); ddpm-deploy takes "
            "them as one vector (obs_as_global_cond).",
            hint=hint,
        )
    drawn = int(unet["final_conv.1.weight"].shape[0])
    said = [_at(opened.config, "policy.action_dim"), _at(opened.config, "action_dim")]
    if "action" in fields:
        said.append(fields["action"]["scale"].numel())
    dims = [n for n in said if isinstance(n, int) and n > 1 and n != drawn]
    film = int(unet["down_modules.0.0.cond_encoder.1.weight"].shape[1])
    conditioned = film > int(unet["diffusion_step_encoder.1.weight"].shape[1])
    if dims or (fields and not conditioned):
        raise CheckpointError(
            f"{path} draws {drawn} numbers a step where an action has "
            f"{dims[0] if dims else 'fewer'}: it fills observations in beside the actions "
            "(inpainting), which ddpm-deploy does not.",
            hint=hint,
        )


def _observation(
    fields: Mapping[str, Mapping[str, Tensor]],
    unet: State,
    config: Mapping[str, Any],
    opened: Opened,
) -> Observation:
    """Returns the one observation of a policy without an encoder."""
    if "obs" not in fields:
        raise CheckpointError(
            f"{opened.path} normalises {', '.join(fields)}, and not obs; a policy without an "
            "encoder sees obs.",
            hint="Take a checkpoint that training wrote.",
        )
    scale, offset = fields["obs"]["scale"], fields["obs"]["offset"]
    size = scale.numel()
    if size == 1:  # one scale for all numbers, or one number
        film = int(unet["down_modules.0.0.cond_encoder.1.weight"].shape[1])
        whole = film - int(unet["diffusion_step_encoder.1.weight"].shape[1])
        steps = _at(config, "policy.n_obs_steps")
        said = _at(config, "policy.obs_dim")
        fitting = whole // steps if isinstance(steps, int) and steps > 0 else size
        size = said if isinstance(said, int) else fitting
    return Observation(name="obs", size=size, normalise=Normalise(times=scale, plus=offset))


def _settings(config: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """Returns the policy's settings, and the first action of a sequence that is carried out."""

    def number(*places: str) -> int | None:
        values = (_at(config, place) for place in places)
        return next((v for v in values if isinstance(v, int) and not isinstance(v, bool)), None)

    settings = {
        "horizon": number("policy.horizon", "policy.shape_meta.action.horizon", "horizon"),
        "n_obs_steps": number("policy.n_obs_steps", "n_obs_steps"),
        "n_action_steps": number("policy.n_action_steps", "n_action_steps"),
        "num_inference_steps": number("policy.num_inference_steps"),
        "n_groups": number("policy.model.n_groups", "policy.n_groups"),
    }
    target = str(_at(config, "policy._target_") or "")
    steps = settings["n_obs_steps"] or 0
    # The policies with encoders count the last observation's own action as the first, but for
    # those of videos; the others do so where they are told to.
    if "Lowdim" in target:
        first = steps - 1 if _at(config, "policy.oa_step_convention") else steps
    else:
        first = steps if "Video" in target else steps - 1
    if _at(config, "policy.pred_action_steps_only"):
        settings["horizon"], first = settings["n_action_steps"], 0
    return {name: value for name, value in settings.items() if value is not None}, max(first, 0)


def _scheduler(config: Mapping[str, Any]) -> dict[str, Any]:
    scheduler = _at(config, "policy.noise_scheduler")
    if not isinstance(scheduler, Mapping):
        return {}
    found = {name: value for name, value in scheduler.items() if value is not None}
    found["kind"] = str(found.pop("_target_", "DDPMScheduler")).rpartition(".")[2]
    for name in _STEP_SETTINGS:  # what the policy hands to every step
        if (value := _at(config, f"policy.{name}")) is not None:
            found[name] = value
    return found


def _at(config: Mapping[str, Any], place: str, depth: int = 8) -> Any:
    """Looks a setting up; one that refers to another is that other, one that computes is None."""
    node: Any = config
    for name in place.split("."):
        node = node.get(name) if isinstance(node, Mapping) else None
    if isinstance(node, str) and node.startswith("${"):
        inner = node[2:-1]
        return _at(config, inner, depth - 1) if depth and ":" not in inner else None
    return node


DIFFUSION_POLICY = Family(
    name=NAME,
    has_all=("down_modules.0.0.blocks.0.block.0.weight", *MARKS),
    read=_read,
    unwrap=_unwrap,
)
