"""Reading checkpoints: open without running their code, unwrap, strip, detect, load strictly."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_deploy.errors import CheckpointError
from ddpm_deploy.files import sha256
from ddpm_deploy.model.facts import Fact, Facts, Said
from ddpm_deploy.model.families import FAMILIES, detect
from ddpm_deploy.model.family import Family, Opened, Reading, State, Weights
from ddpm_deploy.model.guided import Guided
from ddpm_deploy.model.opening import read_content
from ddpm_deploy.model.unet import HEADS
from ddpm_deploy.sampling import Prediction
from ddpm_deploy.schedule import Schedule
from ddpm_deploy.spec import ModelSpec

OWN_FAMILY = "ddpm-deploy"
"""Family of checkpoints that `ddpm-deploy train` wrote: dome272's network with a spec."""

_OWN = {"heads": HEADS}
"""What every network of `train` has and its spec does not say."""

_WRAPPERS: Mapping[Weights, tuple[str, ...]] = {
    "ema": ("ema", "ema_model"),
    "online": ("model", "model_state_dict", "state_dict", "unet", "net", "net_model"),
}
_PREFIXES = ("module.", "_orig_mod.", "model.", "unet.", "ema_model.")


@dataclass(frozen=True, kw_only=True)
class LoadedNetwork:
    """A network with its weights, ready to call.

    Attributes:
        network: In evaluation mode, on the CPU, float32; called with (x, t, *conditions).
        spec: What it is.
        facts: Every hyper-parameter, with where it is from.
    """

    network: nn.Module
    spec: ModelSpec
    facts: tuple[Fact, ...] = ()

    @property
    def assumed(self) -> tuple[Fact, ...]:
        """What no file says and the family's defaults filled in."""
        return tuple(fact for fact in self.facts if fact.source == "assumed")


def load_network(
    path: str | Path,
    *,
    image_size: int | tuple[int, ...] | None = None,
    schedule: Schedule | None = None,
    prediction: Prediction | None = None,
    weights: Weights | None = None,
    settings: Mapping[str, Any] | None = None,
    guidance: float | None = None,
    spec: ModelSpec | None = None,
) -> LoadedNetwork:
    """Loads a checkpoint as the network it is.

    Args:
        path: A `.pt`, `.pth`, `.ckpt` or `.bin` file, `.safetensors`, or a family's folder.
        image_size: Side or (height, width), or a sequence's length, which no state dict says; the
            file's or the family's own when None.
        schedule: The schedule of training; as `image_size`.
        prediction: What the network gives; as `image_size`.
        weights: `ema` or `online`; EMA where the file has it, when None.
        settings: What else the file does not say, by the names in `LoadedNetwork.facts`.
        guidance: Scale of classifier-free guidance to put into the network; none when None.
        spec: What the network is, for files that do not say: that of an engine made from it.

    Raises:
        CheckpointError: The file is missing, damaged, no network, needs code to be read, or holds
            numbers that are not finite; or it lacks the weights that were asked for; or it does not
            say what only the user knows.
        MissingDependencyError: `.safetensors` needs the package of that name.
        SpecError: The spec in a checkpoint of ours is damaged or of a later version.
    """
    path = Path(path)
    opened = open_checkpoint(path, weights)
    if spec and weights is None and spec.weights in set(opened.choices) - {opened.weights}:
        opened = open_checkpoint(path, spec.weights)
    family = detect(opened.state, source=str(path))
    own = _own_spec(opened.content, path)
    said = Said(
        image_size=(image_size,) if isinstance(image_size, int) else image_size,
        schedule=schedule,
        prediction=prediction,
        settings=dict(settings or {}),
    )
    known = own or spec
    if own is not None:
        _check_said(own, said, path)
    if known is not None:
        said = Said(
            image_size=known.sample_shape[1:],
            schedule=known.schedule,
            prediction=known.prediction,
            settings={**(_OWN if own else {}), **known.network, **said.settings},
            source="config",
        )
    facts = Facts(said, source=str(path))
    reading = _read(family, opened, facts)
    found = reading.spec
    if known is not None:
        _check_fit(known, found, path, "the spec in it" if own else "the engine beside it")
        found = known
    found = found.with_changes(
        checkpoint_sha256=sha256(*opened.files),
        weights=opened.weights,
        network={fact.name: fact.value for fact in facts.all if fact.option.startswith("--set")},
    )
    network = _load(family, reading, opened)
    scale = guidance if guidance is not None or spec is None else spec.guidance
    if scale is not None:
        network = Guided(network, found, scale).eval()
        found = found.with_changes(guidance=scale)
    return LoadedNetwork(network=network, spec=found, facts=(_taken(opened), *facts.all))


def open_checkpoint(path: Path, weights: Weights | None = None) -> Opened:
    """Reads a checkpoint and takes its weights out of their wrapping.

    Args:
        path: A file, or a family's folder.
        weights: `ema` or `online`; EMA where it is there, when None.

    Raises:
        CheckpointError: It is missing, damaged, no network, or lacks those weights.
        MissingDependencyError: As from `load_network`.
    """
    if path.is_dir():
        for family in FAMILIES:
            if family.open_folder and (opened := family.open_folder(path, weights)):
                return opened
    content = read_content(path)
    for family in FAMILIES:
        if family.unwrap and (opened := family.unwrap(content, path, weights)):
            return opened if opened.files else replace(opened, files=(path,))
    raw, taken, choices = _unwrap(content, path, weights)
    return Opened(
        path=path,
        state=strip_prefixes(raw),
        weights=taken,
        choices=choices,
        content=content,
        files=(path,),
    )


def choose_weights(found: Mapping[Weights, Any], path: Path, weights: Weights | None) -> Weights:
    """Returns which weights of a checkpoint to take: those asked for, or EMA where it is there.

    Args:
        found: What there is, at least one.
        path: The checkpoint, for errors.
        weights: What is asked for.

    Raises:
        CheckpointError: They are not there.
    """
    taken: Weights = weights or ("ema" if "ema" in found else "online")
    if taken not in found:
        raise CheckpointError(
            f"{path} holds no {taken} weights; it has {', '.join(found)}.",
            hint=f"Type --weights {next(iter(found))}, or leave it out.",
        )
    return taken


def strip_prefixes(raw: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns the tensors of a dictionary without the prefixes that all their names share."""
    state = {k: v.detach() for k, v in raw.items() if isinstance(k, str) and isinstance(v, Tensor)}
    while prefix := next((p for p in _PREFIXES if all(k.startswith(p) for k in state)), None):
        state = {k.removeprefix(prefix): v for k, v in state.items()}
    return state


def _unwrap(
    content: Any, path: Path, weights: Weights | None
) -> tuple[Mapping[str, Any], Weights, tuple[Weights, ...]]:
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, not a dictionary of tensors.",
            hint="Save the weights alone: torch.save(model.state_dict(), 'ckpt.pt')",
        )
    if content.keys() == {"state", "param_groups"}:
        raise CheckpointError(
            f"{path} is an optimizer's state, not a network.",
            hint=f"The weights are usually beside it: ddpm-deploy export {_sibling(path)}",
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
        only: Weights = "ema" if path.name.startswith("ema") else "online"
        return content, only, (only,)
    taken = choose_weights(found, path, weights)
    return found[taken], taken, tuple(found)


def _sibling(path: Path) -> Path:
    """Returns the weights that an optimizer's file belongs to: the EMA's, of the same step."""
    step = re.search(r"\d+$", path.stem)
    ending = f"{step[0] if step else ''}.pt"
    for name in ("ema_ckpt.pt", f"ema_*{ending}", "ckpt.pt", f"model*{ending}"):
        if found := sorted(path.parent.glob(name)):
            return found[-1]
    return path.parent / "ckpt.pt"


def _read(family: Family, opened: Opened, facts: Facts) -> Reading:
    try:
        reading = family.read(opened, facts)
    except (LookupError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise _unfit(family, opened, error) from error
    facts.done()
    return reading


def _load(family: Family, reading: Reading, opened: Opened) -> nn.Module:
    """Loads the weights strictly, once they are known to be finite numbers."""
    state = opened.state if reading.state is None else reading.state
    _check_numbers(state, opened.path)
    network = reading.network
    try:
        network.load_state_dict({k: v.float() for k, v in state.items()}, strict=True)
    except (LookupError, RuntimeError, TypeError, ValueError) as error:
        raise _unfit(family, opened, error) from error
    return network.eval().requires_grad_(False)


def _unfit(family: Family, opened: Opened, error: Exception) -> CheckpointError:
    what = " ".join(str(error).split())
    return CheckpointError(
        f"{opened.path} looks like {family.name} but its weights do not fit that network: "
        f"{what[:400]}",
        hint="Is it a fork that changed the architecture? See docs/checkpoints.md",
    )


def _check_numbers(state: State, path: Path) -> None:
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


def _taken(opened: Opened) -> Fact:
    choices = ", ".join(opened.choices)
    if len(opened.choices) > 1:
        return Fact(
            name="weights",
            value=f"{opened.weights} (of {choices})",
            source="weights",
            option="--weights",
        )
    return Fact(name="weights", value=opened.weights, source="weights")


def _check_said(own: ModelSpec, said: Said, path: Path) -> None:
    """Refuses what contradicts a checkpoint that says what it is."""
    size = own.sample_shape[1:]
    if said.image_size is not None and said.image_size not in {size, size[:1]}:
        raise CheckpointError(
            f"{path} was trained at {'x'.join(map(str, size))}, "
            f"not at --image-size {'x'.join(map(str, said.image_size))}.",
            hint="Leave --image-size out.",
        )
    for name in ("schedule", "prediction"):
        value = getattr(said, name)
        if value is not None and value != getattr(own, name):
            raise CheckpointError(
                f"{path} was trained with the {name} {getattr(own, name)}, not with {value}.",
                hint=f"Leave the {name}'s options out.",
            )


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


def _tensors(mapping: Mapping[str, Any]) -> bool:
    return any(isinstance(k, str) and isinstance(v, Tensor) for k, v in mapping.items())
