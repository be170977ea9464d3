"""Reading checkpoints: open without running their code, unwrap, strip, detect, load strictly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ddpm_deploy.errors import CheckpointError
from ddpm_deploy.files import sha256
from ddpm_deploy.model.facts import Fact, Facts, Said
from ddpm_deploy.model.families import FAMILIES, detect
from ddpm_deploy.model.family import Family, Opened, Reading, Weights
from ddpm_deploy.model.foreign_files import check_folder, is_accelerate, weights_in
from ddpm_deploy.model.guided import Guided
from ddpm_deploy.model.opening import read_content
from ddpm_deploy.model.own import Timed, check_call, check_model, load_own
from ddpm_deploy.model.program import is_program, load_program
from ddpm_deploy.model.tensors import check_numbers, check_tensors
from ddpm_deploy.model.unet import HEADS
from ddpm_deploy.model.wrapping import choose_weights, strip_prefixes, unwrap
from ddpm_deploy.sampling import Prediction
from ddpm_deploy.schedule import Schedule, linear
from ddpm_deploy.spec import ModelSpec

OWN_FAMILY = "ddpm-deploy"
"""Family of checkpoints that `ddpm-deploy train` wrote: dome272's network with a spec."""

_MARKS = frozenset({"key", "image size", "length", "schedule", "prediction"})
"""What a spec's `network` says besides settings: which of its own facts were typed."""

_OWN = {"heads": HEADS}
"""What every network of `train` has and its spec does not say."""


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
    schedule: Schedule | str | None = None,
    timesteps: int | None = None,
    prediction: Prediction | None = None,
    weights: Weights | None = None,
    settings: Mapping[str, Any] | None = None,
    guidance: float | None = None,
    spec: ModelSpec | None = None,
    model: str | None = None,
) -> LoadedNetwork:
    """Loads a checkpoint as the network it is.

    Args:
        path: A `.pt`, `.pth`, `.ckpt` or `.bin` file, `.safetensors`, a `.pt2` program, or a
            family's folder.
        image_size: Side or (height, width), or a sequence's length, which no state dict says; the
            file's or the family's own when None.
        schedule: The schedule of training, or its name; as `image_size`.
        timesteps: Its T, where not all of it is given; as `image_size`.
        prediction: What the network gives; as `image_size`.
        weights: `ema` or `online`; EMA where the file has it, when None.
        settings: What else the file does not say, by the names in `LoadedNetwork.facts`.
        guidance: Scale of classifier-free guidance to put into the network; none when None.
        spec: What the network is, for files that do not say: that of an engine made from it, or
            of a spec.toml.
        model: `package.module:factory`, whose code makes a network of the user's own.

    Raises:
        CheckpointError: The file is missing, damaged, no network, needs code to be read, or holds
            numbers that are not finite; or it lacks the weights that were asked for; or it does not
            say what only the user knows.
        MissingDependencyError: `.safetensors` needs the package of that name.
        SpecError: The spec in a checkpoint of ours is damaged or of a later version.
    """
    path = Path(path)
    said = Said(
        image_size=(image_size,) if isinstance(image_size, int) else image_size,
        schedule=schedule,
        timesteps=timesteps,
        prediction=prediction,
        settings=dict(settings or {}),
    )
    loaded = _load_network(path, said, weights, spec, model)
    scale = guidance if guidance is not None or spec is None else spec.guidance
    if scale is not None and not math.isfinite(scale):
        raise CheckpointError(
            f"The guidance is {scale}; it must be finite.", hint="Type --guidance 3"
        )
    if scale is None:
        return loaded
    network = Guided(loaded.network, loaded.spec, scale).eval()
    return replace(loaded, network=network, spec=loaded.spec.with_changes(guidance=scale))


def _load_network(
    path: Path, said: Said, weights: Weights | None, spec: ModelSpec | None, model: str | None
) -> LoadedNetwork:
    """Loads a checkpoint, without guidance."""
    if is_program(path):
        return _load_program(path, model, spec, said.settings)
    check_model(model, spec, path)
    settings = dict(said.settings)
    key = str(settings.pop("key", spec.network.get("key", "") if spec else ""))
    opened = open_checkpoint(path, weights, key)
    if spec and weights is None and spec.weights in set(opened.choices) - {opened.weights}:
        opened = open_checkpoint(path, spec.weights, key)
    if model is not None and spec is not None:
        return _load_own(opened, spec, model, settings, key)
    family = detect(opened.state, source=str(path), whole=opened.whole)
    own = _own_spec(opened.content, path)
    said = replace(said, settings=settings)
    known = own or spec
    if known is not None:
        _check_said(known, said, path, _OWN if own else {})
        told = known.network
        replayed = {name: value for name, value in told.items() if name not in _MARKS}
        said = Said(
            image_size=known.sample_shape[1:],
            schedule=known.schedule,
            prediction=known.prediction,
            settings={**(_OWN if own else {}), **replayed, **said.settings},
            source="config",
            typed=frozenset(said.settings) | (told.keys() & _MARKS),
        )
    facts = Facts(said, source=str(path))
    reading = _read(family, opened, facts)
    found = reading.spec if own is None else own
    if known is not None:
        _check_fit(
            known,
            reading.spec,
            path,
            "the spec in it" if own else "the engine beside it",
            own=own is not None,
        )
    found = found.with_changes(
        checkpoint_sha256=sha256(*opened.files, *reading.files),
        weights=opened.weights,
        network=_told(facts, key) if spec is None else spec.network,
    )
    network = _load(family, reading, opened)
    return LoadedNetwork(network=network, spec=found, facts=(*_taken(opened, key), *facts.all))


def open_checkpoint(path: Path, weights: Weights | None = None, key: str = "") -> Opened:
    """Reads a checkpoint and takes its weights out of their wrapping.

    Args:
        path: A file, or a folder of a family or of accelerate.
        weights: `ema` or `online`; EMA where it is there, when None.
        key: Of the network among several in one file, `unet` or `models.unet`.

    Raises:
        CheckpointError: It is missing, damaged, no network, or lacks those weights.
        MissingDependencyError: As from `load_network`.
    """
    if path.is_dir():
        for family in FAMILIES:
            if family.open_folder and (opened := family.open_folder(path, weights)):
                return opened
    file = _weights_of(path) if path.is_dir() else path
    content = read_content(file)
    if not key:
        for family in FAMILIES:
            if family.unwrap and (opened := family.unwrap(content, file, weights)):
                check_tensors(opened.state, path)
                return opened if opened.files else replace(opened, files=(file,))
    unwrapped = unwrap(content, file, weights, _is_known, key)
    if weights == "ema" and not unwrapped.named and "ema" not in unwrapped.found:
        raise CheckpointError(
            f"{path} holds one set of weights and does not say that it is the EMA's.",
            hint="Leave --weights out, or give the EMA's own file (ema_ckpt.pt).",
        )
    taken = choose_weights(unwrapped.found, path, weights)
    state = strip_prefixes(unwrapped.found[taken])
    check_tensors(state, path)
    return Opened(
        path=path,
        state=state,
        weights=taken,
        choices=tuple(unwrapped.found),
        content=content,
        files=(file,),
        whole={k: v for k, v in unwrapped.whole.items() if isinstance(v, Tensor)},
    )


def _told(facts: Facts, key: str) -> dict[str, Any]:
    """Returns what no file says of a network, which it takes to read the checkpoint again.

    What a config beside the weights says is read there again, so that a change of it shows.
    """
    told = {
        fact.name: fact.value
        for fact in facts.all
        if fact.option.startswith("--set") and fact.source != "config"
    }
    typed = {f.name: "typed" for f in facts.all if f.name in _MARKS and f.source == "flag"}
    return {**told, **typed, **({"key": key} if key else {})}


def _read(family: Family, opened: Opened, facts: Facts) -> Reading:
    try:
        reading = family.read(opened, facts)
    except (LookupError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise _unfit(family, opened, error) from error
    facts.done()
    try:
        reading.spec.with_changes().table()
    except ValueError as error:
        raise CheckpointError(
            f"{opened.path} says what cannot be: {error}.",
            hint="Say otherwise with --prediction, --schedule, or --set of what the table names.",
        ) from error
    return reading


def _load(family: Family, reading: Reading, opened: Opened) -> nn.Module:
    """Loads the weights strictly, once they are known to be finite numbers."""
    state = opened.state if reading.state is None else reading.state
    # Floats first: float64's largest are beyond float32. Whole numbers are refused as they are.
    state = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    check_numbers(state, opened.path)
    network = reading.network
    try:
        network.load_state_dict(state, strict=True)
    except (LookupError, RuntimeError, TypeError, ValueError) as error:
        raise _unfit(family, opened, error) from error
    return network.eval().requires_grad_(False)


def _unfit(family: Family, opened: Opened, error: Exception) -> CheckpointError:
    what = " ".join(str(error).split())
    fits = (
        "the configuration beside its weights makes no such network"
        if opened.config and not isinstance(error, RuntimeError)
        else "its weights do not fit that network"
    )
    return CheckpointError(
        f"{opened.path} looks like {family.name} but {fits}: {what[:400]}",
        hint="Is it a fork that changed the architecture? See docs/checkpoints.md",
    )


def _load_program(
    path: Path, model: str | None, spec: ModelSpec | None, settings: Mapping[str, Any]
) -> LoadedNetwork:
    if model is not None or settings:
        option = f"--set {next(iter(settings))}" if settings else "--model"
        raise CheckpointError(
            f"{path} is a program of torch.export: the whole network, which takes no {option}.",
            hint=f"Leave {option} out.",
        )
    program, found = load_program(path, spec)
    found = found.with_changes(checkpoint_sha256=sha256(path), weights="")
    network = Timed(program, str(found.network.get("timestep", "index")), found.schedule.T)
    check_call(network, found, f"The program {path}")
    return LoadedNetwork(network=network, spec=found)


def _load_own(
    opened: Opened, spec: ModelSpec, model: str, settings: Mapping[str, Any], key: str
) -> LoadedNetwork:
    own = load_own(opened, spec, model, settings)
    found = own.spec.with_changes(
        checkpoint_sha256=sha256(*opened.files),
        weights=opened.weights,
        network={**own.spec.network, **({"key": key} if key else {})},
    )
    return LoadedNetwork(network=own.network, spec=found, facts=(*_taken(opened, key), *own.facts))


def _is_known(tensors: Mapping[str, Any]) -> bool:
    """Tells whether tensors are a network of a family as they stand."""
    state = strip_prefixes(tensors)
    return any(family.matches(state) for family in FAMILIES)


def _weights_of(folder: Path) -> Path:
    """Returns the weights in a folder of accelerate; other folders are refused by their names.

    Raises:
        CheckpointError: It is none, or holds several networks.
    """
    if not is_accelerate(folder):
        check_folder(folder)
    files = weights_in(folder)
    if len(files) > 1:
        raise CheckpointError(
            f"{folder} is a folder of accelerate with several networks: "
            f"{', '.join(file.name for file in files)}.",
            hint=f"Give the one that samples: ddpm-deploy export {files[0]}",
        )
    return files[0]


def _taken(opened: Opened, key: str) -> tuple[Fact, ...]:
    choices = ", ".join(opened.choices)
    several = len(opened.choices) > 1
    taken = Fact(
        name="weights",
        value=f"{opened.weights} (of {choices})" if several else opened.weights,
        source="weights",
        option="--weights" if several else "",
    )
    named = Fact(name="key", value=key, source="flag", option="--set key=...")
    return (taken, named) if key else (taken,)


def _check_said(known: ModelSpec, said: Said, path: Path, own: Mapping[str, Any]) -> None:
    """Refuses what contradicts a checkpoint that says what it is, or an engine made from it."""
    size = known.sample_shape[1:]
    if said.image_size is not None and said.image_size not in {size, size[:1]}:
        raise CheckpointError(
            f"{path} was trained at {'x'.join(map(str, size))}, "
            f"not at --image-size {'x'.join(map(str, said.image_size))}.",
            hint="Leave --image-size out.",
        )
    try:
        schedule = said.schedule_for(known.schedule)
    except ValueError:
        schedule = linear(said.timesteps or 1)  # of another length: named below
    for name, value in (("schedule", schedule), ("prediction", said.prediction)):
        if value is not None and value != getattr(known, name):
            raise CheckpointError(
                f"{path} was trained with the {name} {getattr(known, name)}, not with {value}.",
                hint=f"Leave the {name}'s options out.",
            )
    for name, fixed in own.items():
        if str(said.settings.get(name, fixed)) != str(fixed):
            raise CheckpointError(
                f"{path} was trained with {name} {fixed}, not {said.settings[name]}.",
                hint=f"Leave --set {name} out.",
            )


def _check_fit(spec: ModelSpec, shown: ModelSpec, path: Path, origin: str, *, own: bool) -> None:
    """Compares a spec with what the weights show."""
    given, wanted = (
        f"{s.sample_shape[0]} channels and {s.label.classes if s.label else 'no'} labels"
        + (f" of {s.family}" if spec.family != shown.family and not own else "")
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
