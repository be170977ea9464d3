"""The folders in which diffusers saves a network: pipelines, flat ones, one model's, training's."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ddpm_deploy.errors import CheckpointError
from ddpm_deploy.model.family import Opened, Weights
from ddpm_deploy.model.opening import damaged, read_content, read_json
from ddpm_deploy.model.wrapping import choose_weights, strip_prefixes

CONFIG = "config.json"
INDEX = "model_index.json"
SCHEDULER = "scheduler_config.json"
NETWORK = "UNet2DModel"

_WEIGHTS = "diffusion_pytorch_model"
_SHARD = re.compile(r"-\d+-of-\d+\.\w+$")
_TRAINING = re.compile(r"checkpoint-\d+$")

_OTHERS: Mapping[str, str] = {
    "UNet2DConditionModel": "a U-Net conditioned by text or pictures, Stable Diffusion's kind",
    "UNet3DConditionModel": "a U-Net for video",
    "UNetSpatioTemporalConditionModel": "a U-Net for video",
    "UNetMotionModel": "a U-Net for video",
    "UNet1DModel": "a U-Net over sequences",
    "UNetModel": "the U-Net of diffusers' first revisions, whose hyper-parameters have other names",
    "AutoencoderKL": "an autoencoder",
    "AutoencoderTiny": "an autoencoder",
    "VQModel": "an autoencoder",
    "ControlNetModel": "a control network, which steers another",
    "Transformer2DModel": "a transformer",
    "DiTTransformer2DModel": "a transformer",
    "SD3Transformer2DModel": "a transformer",
    "FluxTransformer2DModel": "a transformer",
}


@dataclass(frozen=True, kw_only=True)
class _Model:
    """A folder that holds one network: its config, and which weights are there."""

    folder: Path
    config: Mapping[str, Any]
    weights: Weights


def open_folder(path: Path, weights: Weights | None) -> Opened | None:
    """Reads a network's folder, or a pipeline's or a training's that has one in it.

    Args:
        path: The folder.
        weights: As `choose_weights` takes it.

    Raises:
        CheckpointError: It is another network's, or lacks files, or these are damaged.
    """
    index = read_json(path / INDEX)
    models = _models(path, index)
    if not models:
        return None
    found = {model.weights: model for model in models}
    taken = choose_weights(found, path, weights)
    return _opened(path, found[taken], taken, tuple(found))


def unwrap(content: Any, path: Path, weights: Weights | None) -> Opened | None:
    """Reads a weights file that was named itself and has its config beside it.

    Args:
        content: The file's.
        path: The file.
        weights: As `choose_weights` takes it.

    Raises:
        CheckpointError: The config is another network's, or damaged.
    """
    config = _peek(path.parent / CONFIG)
    if not config or not isinstance(content, Mapping):
        return None
    state = _tensors(content)
    if len(state) != len(content):
        return None
    if not path.name.startswith(_WEIGHTS) and "conv_in.weight" not in state:
        return None
    model = _model(path.parent, config)
    taken = choose_weights({model.weights: model}, path, weights)
    given = None if _SHARD.search(path.name) else (state, (path,))
    return _opened(path, model, taken, (taken,), given)


def config_beside(path: Path) -> tuple[Mapping[str, Any], tuple[Path, ...]]:
    """Returns the network's config and its scheduler's beside a file, and what was read for it."""
    config = _peek(path.parent / CONFIG)
    return _configs(_model(path.parent, config)) if config else ({}, ())


def _opened(
    path: Path,
    model: _Model,
    taken: Weights,
    choices: tuple[Weights, ...],
    given: tuple[Mapping[str, Tensor], tuple[Path, ...]] | None = None,
) -> Opened:
    state, files = given or _state(model.folder)
    config, beside = _configs(model)
    return Opened(
        path=path,
        state=strip_prefixes(state),
        weights=taken,
        choices=choices,
        config=config,
        files=(*files, *beside),
    )


def _configs(model: _Model) -> tuple[dict[str, Any], tuple[Path, ...]]:
    """Returns what stands beside a network, and the files that say it."""
    config: dict[str, Any] = {"unet": model.config, "scheduler": {}, "pipeline": {}}
    files = [model.folder / CONFIG]
    for place in _around(model.folder):
        for name in (f"scheduler/{SCHEDULER}", SCHEDULER):
            if not config["scheduler"] and (scheduler := read_json(place / name)):
                config["scheduler"] = scheduler
                files.append(place / name)
        if not config["pipeline"] and (index := read_json(place / INDEX)):
            config["pipeline"] = index
            files.append(place / INDEX)
    return config, tuple(files)


def _around(folder: Path) -> Iterator[Path]:
    """Yields where a network's scheduler may stand: its folder, its pipeline's, its training's."""
    yield folder
    folder = folder.absolute()
    if folder.name in {"unet", "unet_ema"}:
        folder = folder.parent
        yield folder
    if _TRAINING.match(folder.name):
        yield folder.parent


def _models(path: Path, index: Mapping[str, Any]) -> list[_Model]:
    if "_class_name" in index:
        return [_of_pipeline(path, index)]
    if config := _peek(path / CONFIG):
        return [_model(path, config)]
    inside = [path / name for name in ("unet", "unet_ema")]
    found = [_model(f, config) for f in inside if (config := _peek(f / CONFIG))]
    if not found:
        steps = [p for p in path.glob(f"checkpoint-*/unet*/{CONFIG}") if _peek(p)]
        if steps:
            last = max(steps, key=lambda p: (len(p.parts[-3]), p.parts[-3])).parents[1]
            raise CheckpointError(
                f"{path} holds checkpoints of a training that has not ended: no {INDEX}.",
                hint=f"Name one of them: ddpm-deploy export {last}",
            )
    return found


def _of_pipeline(path: Path, index: Mapping[str, Any]) -> _Model:
    pipeline, unet = str(index["_class_name"]), index.get("unet")
    if not isinstance(unet, list) or len(unet) != 2:
        parts = ", ".join(name for name, part in index.items() if isinstance(part, list))
        raise CheckpointError(
            f"{path} is a {pipeline} of diffusers, of {parts or 'nothing'}: it has no unet.",
            hint="The pipelines that can be exported, such as DDPMPipeline, have a unet, a "
            f"{NETWORK}.",
        )
    _check_class(path, str(unet[1]))
    if latent := [name for name in ("vqvae", "vae") if isinstance(index.get(name), list)]:
        raise CheckpointError(
            f"{path} is a {pipeline}: its network draws what the {latent[0]} in it decodes, "
            "not pictures.",
            hint="Pictures of latent diffusion need the decoder, too; it cannot be exported.",
        )
    for folder in (path / "unet", path):
        if config := read_json(folder / CONFIG):
            return _model(folder, config)
    raise CheckpointError(
        f"{path / INDEX} names a unet, and there is neither {path / 'unet' / CONFIG} nor "
        f"{path / CONFIG}.",
        hint="Copy the whole folder that save_pretrained wrote.",
    )


def _model(folder: Path, config: Mapping[str, Any]) -> _Model:
    _check_class(folder, str(config.get("_class_name", NETWORK)))
    # Training's folder is called so, or its EMAModel has added these to the config.
    ema = folder.name == "unet_ema" or (
        {"decay", "optimization_step"} <= config.keys()
        and not (folder.parent / "unet_ema").is_dir()
    )
    return _Model(folder=folder, config=config, weights="ema" if ema else "online")


def _check_class(path: Path, name: str) -> None:
    if name == NETWORK:
        return
    hint = f"The networks that can be exported are of the class {NETWORK}."
    if name == "UNetModel":
        hint = f"Take a later revision of the same model, whose {CONFIG} says {NETWORK}."
    raise CheckpointError(
        f"{path} holds a {name}: {_OTHERS.get(name, 'another network of diffusers')}.", hint=hint
    )


def _state(folder: Path) -> tuple[dict[str, Tensor], tuple[Path, ...]]:
    """Reads the weights of a folder: safetensors before pickles, the plain ones before variants.

    Raises:
        CheckpointError: There are none, or a part of them is missing or damaged.
    """
    names = sorted(p.name for p in folder.glob(f"{_WEIGHTS}*") if p.is_file())
    for suffix in ("safetensors", "bin"):
        whole = [n for n in names if n.endswith(f".{suffix}") and not _SHARD.search(n)]
        indices = [n for n in names if n.endswith(".json") and f".{suffix}." in n]
        # The plain name is the shortest; others say a variant, such as fp16, before the suffix.
        for name in sorted(whole, key=len):
            return _tensors_of(folder / name), (folder / name,)
        for name in sorted(indices, key=len):
            return _sharded(folder / name)
    there = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
    raise CheckpointError(
        f"{folder} has no weights beside its {CONFIG}; it holds {there[:200]}.",
        hint=f"Copy {_WEIGHTS}.safetensors or .bin there, too.",
    )


def _sharded(index: Path) -> tuple[dict[str, Tensor], tuple[Path, ...]]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, Mapping) or not places:
        raise damaged(index, "it has no weight_map")
    # The names alone: nothing is read outside the folder.
    shards = sorted({index.parent / Path(str(place)).name for place in places.values()})
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise CheckpointError(
            f"{index.parent} lacks {missing[0]}, one of {len(shards)} parts of the weights.",
            hint="Copy the whole folder that save_pretrained wrote.",
        )
    state: dict[str, Tensor] = {}
    for shard in shards:
        state.update(_tensors_of(shard))
    if absent := [name for name in places if name not in state]:
        raise damaged(index, f"it names {absent[0]}, which no part holds")
    return state, (*shards, index)


def _tensors_of(path: Path) -> dict[str, Tensor]:
    content = read_content(path)
    state = _tensors(content) if isinstance(content, Mapping) else {}
    if not state:
        raise damaged(path, "it holds no tensors by name")
    return state


def _tensors(content: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}


def _peek(path: Path) -> dict[str, Any]:
    """Reads a network's config; {} where there is none, or it is of some other tool."""
    try:
        config = read_json(path)
    except CheckpointError:
        if any(path.parent.glob(f"{_WEIGHTS}*")):
            raise
        return {}
    return config if "_class_name" in config else {}
