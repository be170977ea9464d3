"""Diffusion policies of huggingface/lerobot: folders with `config.json` and `model.safetensors`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_deploy.errors import CheckpointError
from ddpm_deploy.model.facts import Facts
from ddpm_deploy.model.family import Family, Opened, Reading, State, Weights
from ddpm_deploy.model.opening import read_content, read_json
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

NAME = "lerobot"

_UNET = "diffusion.unet."
_ENCODER = "diffusion.rgb_encoder."
_STATISTICS = ("normalize_inputs.", "normalize_targets.", "unnormalize_outputs.")
_EPS = 1e-8
_SCHEDULER = (
    "num_train_timesteps",
    "beta_schedule",
    "beta_start",
    "beta_end",
    "prediction_type",
    "clip_sample",
    "clip_sample_range",
)
_TYPES = {"observation.state": "STATE", "observation.environment_state": "ENV", "action": "ACTION"}
_KNOWN_STEPS = {
    "normalizer_processor",
    "unnormalizer_processor",
    "device_processor",
    "to_batch_processor",
    "rename_observations_processor",
}


def _open_folder(path: Path, weights: Weights | None) -> Opened | None:
    """Opens what training saved, from the policy's own folder up to that of the run."""
    for folder in (
        path,
        path / "pretrained_model",
        path / "checkpoints" / "last" / "pretrained_model",
    ):
        config = _peek(folder / "config.json")
        if not _is_policy(config):
            continue
        if config.get("type", "diffusion") != "diffusion":
            raise CheckpointError(
                f"{folder} is a policy of the type {config['type']}; of LeRobot's, ddpm-deploy "
                "takes the type diffusion.",
                hint="Train one: lerobot-train --policy.type=diffusion",
            )
        file = folder / "model.safetensors"
        if not file.is_file():
            raise CheckpointError(
                f"{folder} has a config.json and no model.safetensors.",
                hint=f"Copy the whole folder from where it was trained: ls {folder}",
            )
        return _opened(read_content(file), file, config, path, weights)
    return None


def _unwrap(content: Any, path: Path, weights: Weights | None) -> Opened | None:
    """Opens a policy's weights that were named alone, with the configuration beside them."""
    if not isinstance(content, Mapping) or not any(
        isinstance(key, str) and key.endswith(_UNET + MARKS[0]) for key in content
    ):
        return None
    config = _peek(path.parent / "config.json")
    state = strip_prefixes(content)
    return _opened(state, path, config if _is_policy(config) else {}, path, weights)


def _opened(
    content: State, file: Path, config: Mapping[str, Any], path: Path, weights: Weights | None
) -> Opened:
    # torch.compile puts its own name between.
    state = {key.replace("unet._orig_mod.", "unet."): value for key, value in content.items()}
    if config and _UNET + MARKS[0] not in state:
        raise CheckpointError(
            f"{file} has no UNet of a diffusion policy; its names begin with "
            f"{', '.join(list(state)[:3])}.",
            hint="Is its config.json that of another policy?",
        )
    files, processors = [file], {}
    if config:
        files.append(file.parent / "config.json")
        for name in ("policy_preprocessor", "policy_postprocessor"):
            described = read_json(file.parent / f"{name}.json")
            if not described:
                continue
            files.append(file.parent / f"{name}.json")
            processors[name], used = _processor(described, file.parent)
            files.extend(used)
    return Opened(
        path=path,
        state={key.removeprefix(_UNET): value for key, value in state.items()},
        weights=choose_weights({"online": state}, path, weights),
        choices=("online",),
        content={},
        config={**config, "_processors": processors},
        files=tuple(dict.fromkeys(files)),
    )


def _renamed(name: str) -> str:
    """Returns the name that diffusion_policy gives a weight of the UNet."""
    for mine, theirs in ((".conv1.", ".blocks.0."), (".conv2.", ".blocks.1.")):
        name = name.replace(mine, theirs)
    part, _, rest = name.partition(".")
    level, _, rest = rest.partition(".")
    if part in {"down_modules", "up_modules"} and rest in {"2.weight", "2.bias"}:
        name = f"{part}.{level}.2.conv.{rest.removeprefix('2.')}"
    return name


def _read(opened: Opened, facts: Facts) -> Reading:
    state, config = opened.state, opened.config
    outer = (_ENCODER, *_STATISTICS)
    unet = {_renamed(k): v for k, v in state.items() if k.startswith(MODULES)}
    features = _features(config) or _features_of(state)
    images = [name for name, feature in features.items() if feature.kind == "VISUAL"]
    encoded = bool(images) or any(key.startswith(_ENCODER) for key in state)
    seen = [] if encoded else [f for f in features.values() if f.kind in {"STATE", "ENV"}]
    acted = features.get("action")
    # The state comes first, whatever the order in the file.
    seen.sort(key=lambda feature: feature.kind == "ENV")
    statistics = _Statistics(opened, state)
    used = [*seen, *([acted] if acted else [])]
    if _normalised(facts, used, statistics):
        observations = tuple(
            Observation(name=f.name, size=f.size, normalise=statistics.normalise(f)) for f in seen
        )
        restore = statistics.restore(acted) if acted else None
    else:
        observations = tuple(Observation(name=f.name, size=f.size) for f in seen)
        restore = None
    names = ("horizon", "n_obs_steps", "n_action_steps", "n_groups", "num_inference_steps")
    settings = {n: config[n] for n in names if isinstance(config.get(n), int)}
    outside = [f"rgb_encoder ({', '.join(images)}): give global_cond what it gives"] * encoded
    outside += statistics.unknown_steps(encoded=encoded)
    scheduler = {n: config[n] for n in _SCHEDULER if config.get(n) is not None}
    if scheduler:
        scheduler["kind"] = config.get("noise_scheduler_type", "DDPM")
    policy = Policy(
        state=unet,
        left={k: v for k, v in state.items() if not k.startswith((*MODULES, *outer))},
        settings=settings,
        first_action=max(settings.get("n_obs_steps", 1) - 1, 0),
        observations=observations,
        outside="; ".join(outside),
        scheduler=scheduler,
        restore=restore,
    )
    return read_policy(policy, opened, facts, family=NAME)


def _normalised(facts: Facts, used: list[_Feature], statistics: _Statistics) -> bool:
    """Tells whether the graph normalises, having said how."""
    modes = {f.name: statistics.mode(f) for f in used}
    described = ", ".join(f"{name} {mode}" for name, mode in modes.items() if mode != "IDENTITY")
    missing = [f.name for f in used if modes[f.name] != "IDENTITY" and not statistics.of(f)]
    allowed = {"none"} if missing else {"none", described}
    if missing:
        said = facts.need(
            "normalization",
            str,
            why=f"It normalises {', '.join(missing)}, and with which numbers stands in files that "
            "are not there: policy_preprocessor*, policy_postprocessor*.",
            hint="Copy the whole folder of the policy; or take the network alone, with normalised "
            "observations and actions: --set normalization=none",
        )
    elif not described:
        facts.remark(
            "normalization", "none that a file tells of: numbers stay as trained", "assumed"
        )
        return False
    else:
        said = facts.found("normalization", described, "config")
    if said not in allowed:
        raise CheckpointError(
            f"normalization is {said!r}; it is {described!r} by the files, or none.",
            hint="Leave it out, or type --set normalization=none",
        )
    return said != "none"


@dataclass(frozen=True)
class _Feature:
    name: str
    kind: str
    size: int


def _features(config: Mapping[str, Any]) -> dict[str, _Feature]:
    """Returns what goes in and out of a policy, from a configuration of either form."""
    found = {}
    for place in ("input_features", "output_features"):
        for name, feature in _mapping(config.get(place)).items():
            shape = _mapping(feature).get("shape") or [0]
            kind = str(_mapping(feature).get("type"))
            if kind == "STATE" and name != "observation.state":
                continue  # the original takes that state alone
            found[name] = _Feature(name, kind, int(shape[0]))
    for place in ("input_shapes", "output_shapes"):  # before 2025
        for name, shape in _mapping(config.get(place)).items():
            kind = "VISUAL" if name.startswith("observation.image") else _TYPES.get(name, "")
            found[name] = _Feature(name, kind, int(shape[0]))
    return found


def _features_of(state: State) -> dict[str, _Feature]:
    """Returns what goes in and out of a policy by the statistics in its file (before v0.4)."""
    found = {}
    for key, value in state.items():
        if key.startswith(("normalize_inputs.buffer_", "unnormalize_outputs.buffer_")):
            flat = key.split(".")[1].removeprefix("buffer_")
            name = flat.replace("observation_", "observation.", 1)
            kind = "VISUAL" if name.startswith("observation.image") else _TYPES.get(name, "")
            found[name] = _Feature(name, kind, value.numel())
    return found


class _Statistics:
    """The numbers that observations and actions are normalised with, wherever they stand."""

    def __init__(self, opened: Opened, state: State) -> None:
        self._opened, self._state = opened, state
        self._config = opened.config
        self._processors: Mapping[str, Mapping[str, Any]] = opened.config.get("_processors", {})
        # Before v0.4 they stood among the weights, under names that say how.
        self._old = not self._processors and any(key.startswith(_STATISTICS) for key in state)

    def mode(self, feature: _Feature) -> str:
        """Returns how a feature is normalised: MIN_MAX, MEAN_STD, ..., or IDENTITY."""
        if self._old:
            place = self._place(feature)
            named = {"MIN_MAX": f"{place}min", "MEAN_STD": f"{place}mean"}
            return next((mode for mode, name in named.items() if name in self._state), "IDENTITY")
        processor = self._processor(feature)
        if "norm_map" in processor:
            return str(_mapping(processor["norm_map"]).get(feature.kind, "IDENTITY"))
        for place in ("input_normalization_modes", "output_normalization_modes"):
            if place in self._config:  # before 2025, by name
                modes = _mapping(self._config[place])
                if feature.name in modes:
                    return str(modes[feature.name]).upper()
        return str(
            _mapping(self._config.get("normalization_mapping")).get(feature.kind, "IDENTITY")
        )

    def of(self, feature: _Feature) -> dict[str, Tensor]:
        """Returns a feature's numbers by name, float32; none where the files have none."""
        if self._old:
            tensors, prefix = self._state, self._place(feature)
        else:
            tensors, prefix = self._processor(feature).get("tensors", {}), f"{feature.name}."
        found = {
            key.removeprefix(prefix): value.detach().float().flatten()
            for key, value in tensors.items()
            if key.startswith(prefix) and "." not in key.removeprefix(prefix)
        }
        wanted = {"MEAN_STD": ("mean", "std"), **_RANGES}.get(self.mode(feature), ())
        found = {name: found[name] for name in wanted if name in found}
        if len(found) != len(wanted):
            return {}
        finite({f"{prefix}{name}": value for name, value in found.items()}, self._opened)
        if wrong := [n for n, v in found.items() if v.numel() not in {1, feature.size}]:
            raise CheckpointError(
                f"{self._opened.path} has {found[wrong[0]].numel()} numbers in {prefix}{wrong[0]} "
                f"for the {feature.size} of {feature.name}.",
                hint="Is its configuration that of another training?",
            )
        return found

    def normalise(self, feature: _Feature) -> Normalise | None:
        """Returns what takes a feature from its own units."""
        numbers, mode = self.of(feature), self.mode(feature)
        if mode == "MEAN_STD":
            return Normalise(minus=numbers["mean"], over=numbers["std"] + self._eps(feature))
        if mode in _RANGES:
            low, high = (numbers[name] for name in _RANGES[mode])
            two, one = torch.tensor([2.0]), torch.tensor([-1.0])
            return Normalise(minus=low, over=self._range(low, high, feature), times=two, plus=one)
        return None

    def restore(self, feature: _Feature) -> Restore | None:
        """Returns what takes a feature into its own units."""
        numbers, mode = self.of(feature), self.mode(feature)
        if mode == "MEAN_STD":
            return restored(numbers["std"].double(), numbers["mean"].double())
        if mode in _RANGES:
            low, high = (numbers[name] for name in _RANGES[mode])
            half = (high - low if self._old else self._range(low, high, feature)).double() / 2
            return restored(half, half + low.double())
        return None

    def unknown_steps(self, *, encoded: bool) -> list[str]:
        """Names the steps of the processors that change numbers and are not in the graph."""
        wanted = (
            ["policy_postprocessor"] if encoded else ["policy_preprocessor", "policy_postprocessor"]
        )
        return [
            f"{step} of {name}.json"
            for name in wanted
            for step in _mapping(self._processors.get(name)).get("steps", ())
            if step not in _KNOWN_STEPS
        ]

    def _place(self, feature: _Feature) -> str:
        place = "unnormalize_outputs" if feature.kind == "ACTION" else "normalize_inputs"
        return f"{place}.buffer_{feature.name.replace('.', '_')}."

    def _range(self, low: Tensor, high: Tensor, feature: _Feature) -> Tensor:
        if self._old:
            return high - low + _EPS
        width = high - low
        return torch.where(width == 0, torch.tensor(self._eps(feature)), width)

    def _eps(self, feature: _Feature) -> float:
        return _EPS if self._old else float(self._processor(feature).get("eps", _EPS))

    def _processor(self, feature: _Feature) -> Mapping[str, Any]:
        which = "policy_postprocessor" if feature.kind == "ACTION" else "policy_preprocessor"
        return self._processors.get(which, {})


_RANGES = {"MIN_MAX": ("min", "max"), "QUANTILES": ("q01", "q99"), "QUANTILE10": ("q10", "q90")}


def _processor(described: Mapping[str, Any], folder: Path) -> tuple[dict[str, Any], list[Path]]:
    """Reads a pipeline's description, and the numbers of its normalising step."""
    steps = [_mapping(step) for step in described.get("steps") or ()]
    found: dict[str, Any] = {"steps": [str(s.get("registry_name", s.get("class"))) for s in steps]}
    files = []
    for step in steps:
        if step.get("registry_name") in {"normalizer_processor", "unnormalizer_processor"}:
            found.update(_mapping(step.get("config")))
            if name := step.get("state_file"):
                file = folder / Path(str(name)).name  # never outside the folder
                if file.is_file():
                    found["tensors"] = read_content(file)
                    files.append(file)
    return found, files


def _is_policy(config: Mapping[str, Any]) -> bool:
    """Tells a policy's configuration from other programs' `config.json`."""
    if config.get("type") is not None and "_class_name" not in config:
        return "input_features" in config or "normalization_mapping" in config
    return "noise_scheduler_type" in config and "down_dims" in config  # before 2025


def _peek(path: Path) -> dict[str, Any]:
    """Reads a configuration that may be another program's; {} where it is none.

    Raises:
        CheckpointError: It is damaged, and a policy's weights stand beside it.
    """
    try:
        return read_json(path)
    except CheckpointError:
        if (path.parent / "model.safetensors").is_file():
            raise
        return {}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


LEROBOT = Family(
    name=NAME,
    has_all=("down_modules.0.0.conv1.block.0.weight", *MARKS),
    read=_read,
    unwrap=_unwrap,
    open_folder=_open_folder,
)
