"""Reading checkpoints: open without running their code, unwrap, strip, detect, load strictly."""

from __future__ import annotations

import pickletools
import re
import warnings
import zipfile
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ddpm_deploy.errors import CheckpointError, MissingDependencyError
from ddpm_deploy.files import sha256
from ddpm_deploy.model.families import Family, detect
from ddpm_deploy.schedule import Schedule
from ddpm_deploy.spec import ModelSpec

Weights = Literal["ema", "online"]

OWN_FAMILY = "ddpm-deploy"
"""Family of checkpoints that `ddpm-deploy train` wrote: dome272's network with a spec."""

_WRAPPERS: Mapping[Weights, tuple[str, ...]] = {
    "ema": ("ema", "ema_model"),
    "online": ("model", "model_state_dict", "state_dict", "unet", "net", "net_model"),
}
_FOLDER = 0x10
"""The attribute by which the zip library in torch takes a record for a folder."""
_PREFIXES = ("module.", "_orig_mod.", "model.", "unet.", "ema_model.")


@dataclass(frozen=True, kw_only=True)
class LoadedNetwork:
    """A network with its weights, ready to call.

    Attributes:
        network: In evaluation mode, on the CPU, float32; called with (x, t, *conditions).
        spec: What it is.
        weights: Which weights were taken, where the file holds both.
        assumed: What the file does not say and the family's defaults filled in, a line each.
    """

    network: nn.Module
    spec: ModelSpec
    weights: Weights
    assumed: tuple[str, ...] = ()


def load_network(
    path: str | Path,
    *,
    image_size: int | None = None,
    schedule: Schedule | None = None,
    weights: Weights | None = None,
    spec: ModelSpec | None = None,
) -> LoadedNetwork:
    """Loads a checkpoint as the network it is.

    Args:
        path: A `.pt`, `.pth` or `.ckpt` file, or `.safetensors`.
        image_size: Height and width, which no state dict says; the family's default when None.
        schedule: The schedule of training, which no state dict says; as `image_size`.
        weights: `ema` or `online`; EMA where the file has it, when None.
        spec: What the network is, for files that do not say; the family's defaults when None.

    Raises:
        CheckpointError: The file is missing, damaged, no network, needs code to be read, or holds
            numbers that are not finite; or it lacks the weights that were asked for.
        MissingDependencyError: `.safetensors` needs the package of that name.
        SpecError: The spec in a checkpoint of ours is damaged or of a later version.
    """
    path = Path(path)
    content = read_content(path)
    raw, taken = _unwrap(content, path, weights)
    state = _strip(raw)
    family = detect(state, source=str(path))
    network = _build(family, state, path)
    own = _own_spec(content, path)
    assumed: tuple[str, ...] = ()
    if own is not None:
        if image_size is not None and own.sample_shape[1:] != (image_size, image_size):
            raise CheckpointError(
                f"{path} was trained at {'x'.join(map(str, own.sample_shape[1:]))}, "
                f"not at --image-size {image_size}.",
                hint="Leave --image-size out.",
            )
        if schedule is not None and own.schedule != schedule:
            raise CheckpointError(
                f"{path} was trained with the schedule {own.schedule}, not with {schedule}.",
                hint="Leave the schedule's options out.",
            )
        _check_fit(own, family.spec(state, None), path, "the spec in it")
        spec = own
    elif spec is None:
        spec = family.spec(state, image_size)
        assumed = _assumed(spec, image_size, schedule)
        if schedule is not None:
            if spec.first_timestep >= schedule.T:
                raise CheckpointError(
                    f"The schedule has {schedule.T} timestep(s); networks of {family.name} are "
                    f"trained from t = {spec.first_timestep} on.",
                    hint="Type the T of training: --timesteps 1000",
                )
            spec = spec.with_changes(schedule=schedule)
    else:
        _check_fit(spec, family.spec(state, None), path, "the engine beside it")
    spec = spec.with_changes(checkpoint_sha256=sha256(path))
    return LoadedNetwork(network=network, spec=spec, weights=taken, assumed=assumed)


def read_content(path: Path) -> Any:
    """Reads a checkpoint file's content without running any code that is in it.

    Raises:
        CheckpointError: The file is missing, damaged, or needs code to be read.
        MissingDependencyError: `.safetensors` needs the package of that name.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise CheckpointError(
            f"{path} {what}; a checkpoint is a file.", hint="Check the path: ls " + str(path.parent)
        )
    if path.stat().st_size == 0:
        raise _damaged(path, "it is empty")
    if path.suffix in {".onnx", ".plan"}:
        raise CheckpointError(
            f"{path} is an engine already; a checkpoint is what training saved.",
            hint=f"Build it or draw with it: ddpm-deploy sample --engine {path}",
        )
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    _check_archive(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's remarks about the pickle's version
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises nearly anything on a damaged file
        if asked := _global_in(str(error)) or _global_of(path):
            raise CheckpointError(
                f"{path} is a pickle that runs code when it is read: it asks for {asked}. "
                "ddpm-deploy reads tensors only, since such a file can do anything to this "
                "machine.",
                hint="Where the file was made, save the weights alone: "
                "torch.save(model.state_dict(), 'ckpt.pt')",
            ) from error
        raise _damaged(path, _reason(path, error)) from error


def _open_safetensors(path: Path) -> Any:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise MissingDependencyError(
            f"safetensors is needed here to read {path}, and is not installed ({error}).",
            hint="pip install 'ddpm-deploy[export]'",
        ) from error
    try:
        return load_file(path)
    except (SafetensorError, ValueError, KeyError) as error:
        raise _damaged(path, str(error)) from error


def _check_archive(path: Path) -> None:
    """Compares every record of a zip checkpoint with its checksum, which torch does not."""
    try:
        if not zipfile.is_zipfile(path):
            return  # torch's form before 1.6 has no sums
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            bad = archive.testzip()
    except Exception as error:  # zipfile raises nearly anything on a damaged archive
        raise _damaged(path, str(error)) from error
    if bad is not None:
        raise _damaged(path, f"the checksum of its record {bad} does not match")
    if folders := [r.filename for r in records if r.is_dir() or r.external_attr & _FOLDER]:
        # torch reads nothing for a folder, and hands out memory as it finds it.
        raise _damaged(path, f"its record {folders[0]} is marked as a folder")
    if any(record.filename.endswith("/constants.pkl") for record in records):
        raise CheckpointError(
            f"{path} is a TorchScript archive: a program, not the weights alone.",
            hint="Save its weights: torch.save(torch.jit.load(FILE).state_dict(), 'ckpt.pt')",
        )


def _global_in(message: str) -> str:
    """Picks what a pickle wanted to import out of torch's message; empty if it says nothing."""
    found = re.search(r"GLOBAL ([\w.]+)", message)
    return found[1] if found else ""


def _global_of(path: Path) -> str:
    """Returns what a pickle would import besides torch's own, without running it.

    torch's reader stops at the first opcode of a newer protocol, before it comes to the import.
    """
    strings = deque[str](maxlen=2)
    try:
        for opcode, argument, _ in pickletools.genops(_pickle_in(path)):
            name = ""
            if opcode.name in {"GLOBAL", "INST"}:
                name = str(argument).replace(" ", ".")
            elif opcode.name == "STACK_GLOBAL":
                name = ".".join(strings)
            elif isinstance(argument, str):
                strings.append(argument)
            if name and not name.startswith(("torch.", "collections.")):
                return name
    except Exception:  # noqa: BLE001  (no pickle, or a damaged one)
        return ""
    return ""


def _pickle_in(path: Path) -> bytes:
    if not zipfile.is_zipfile(path):
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        return archive.read(name)


def _reason(path: Path, error: Exception) -> str:
    """Says what is wrong with a file that torch cannot read, in words of ours.

    Torch's own text advises to load the file with `weights_only=False`, which runs its code.
    """
    with path.open("rb") as file:
        start = file.read(2)
    if start == b"PK" and not zipfile.is_zipfile(path):
        return "it begins as an archive whose end is missing"
    if start[:1] != b"\x80" and start != b"PK":
        return "it is neither an archive nor a pickle"
    line = next(iter(str(error).splitlines()), "")
    return "its pickle cannot be read" if not line or "weights_only" in line else line


def _unwrap(content: Any, path: Path, weights: Weights | None) -> tuple[Mapping[str, Any], Weights]:
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, not a dictionary of tensors.",
            hint="Save the weights alone: torch.save(model.state_dict(), 'ckpt.pt')",
        )
    if content.keys() == {"state", "param_groups"}:
        siblings = [n for n in ("ema_ckpt.pt", "ckpt.pt") if (path.parent / n).is_file()]
        sibling = path.parent / (siblings[0] if siblings else "ckpt.pt")
        raise CheckpointError(
            f"{path} is an optimizer's state, not a network.",
            hint=f"The weights are usually beside it: ddpm-deploy export {sibling}",
        )
    found: dict[Weights, Mapping[str, Any]] = {}
    for kind, keys in _WRAPPERS.items():
        for key in keys:
            inner = content.get(key)
            if kind not in found and isinstance(inner, Mapping) and _tensors(inner):
                found[kind] = inner
    if not found:
        if not _tensors(content):
            raise CheckpointError(
                f"{path} holds no tensors; its keys are {', '.join(map(str, list(content)[:5]))}.",
                hint="Save the weights: torch.save(model.state_dict(), 'ckpt.pt')",
            )
        found["online"] = content
        if weights == "ema" and not path.name.startswith("ema"):
            raise CheckpointError(
                f"{path} holds one set of weights and does not say that it is the EMA's.",
                hint="Leave --weights out, or give the EMA's own file (ema_ckpt.pt).",
            )
        return content, "ema" if path.name.startswith("ema") else "online"
    taken: Weights = weights or ("ema" if "ema" in found else "online")
    if taken not in found:
        raise CheckpointError(
            f"{path} holds no {taken} weights; it has {', '.join(found)}.",
            hint=f"Type --weights {next(iter(found))}, or leave it out.",
        )
    return found[taken], taken


def _strip(raw: Mapping[str, Any]) -> dict[str, Tensor]:
    state = {k: v.detach() for k, v in raw.items() if isinstance(k, str) and isinstance(v, Tensor)}
    while prefix := next((p for p in _PREFIXES if all(k.startswith(p) for k in state)), None):
        state = {k.removeprefix(prefix): v for k, v in state.items()}
    return state


def _build(family: Family, state: Mapping[str, Tensor], path: Path) -> nn.Module:
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            raise CheckpointError(
                f"{path} holds {tensor.dtype} in {name}; weights are floating-point numbers.",
                hint="Quantised weights cannot be exported: take the file that was trained.",
            )
        if not bool(torch.isfinite(tensor).all()):
            wrong = int((~torch.isfinite(tensor)).sum())
            raise CheckpointError(
                f"{path} has numbers that are not finite: {wrong} of {tensor.numel()} in {name}.",
                hint="Training diverged before this was saved; take an earlier checkpoint.",
            )
    try:
        network = family.build(state)
        network.load_state_dict({k: v.float() for k, v in state.items()}, strict=True)
    except (LookupError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        what = " ".join(str(error).split())
        raise CheckpointError(
            f"{path} looks like {family.name} but its weights do not fit that network: {what}",
            hint="Is it a fork that changed the architecture? See docs/checkpoints.md",
        ) from error
    return network.eval().requires_grad_(False)


def _check_fit(spec: ModelSpec, shown: ModelSpec, path: Path, origin: str) -> None:
    """Compares a spec with what the weights show."""
    given, wanted = (
        f"{s.sample_shape[0]} channels and {s.label.classes if s.label else 'no'} labels"
        for s in (spec, shown)
    )
    if given != wanted:
        raise CheckpointError(
            f"{path} is a network of {wanted}; {origin} has {given}.",
            hint="Give the checkpoint that the engine was exported from.",
        )


def _own_spec(content: Any, path: Path) -> ModelSpec | None:
    if not isinstance(content, Mapping) or "ddpm_deploy" not in content:
        return None
    own = content["ddpm_deploy"]
    text = own.get("spec") if isinstance(own, Mapping) else None
    return ModelSpec.from_json(str(text), source=str(path))


def _assumed(spec: ModelSpec, image_size: int | None, schedule: Schedule | None) -> tuple[str, ...]:
    size = "x".join(map(str, spec.sample_shape[1:]))
    return (
        *(() if image_size else (f"image size {size} (--image-size)",)),
        *(() if schedule else (f"schedule {spec.schedule} (--schedule, --timesteps)",)),
        f"prediction {spec.prediction}",
    )


def _tensors(mapping: Mapping[str, Any]) -> bool:
    return any(isinstance(k, str) and isinstance(v, Tensor) for k, v in mapping.items())


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged, or is no checkpoint: {what}.",
        hint="Copy it again from where it was trained, and compare: sha256sum " + str(path),
    )
