"""Networks of a user's own: made by code that the user names, with weights from a checkpoint."""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ddpm_deploy.errors import CheckpointError
from ddpm_deploy.model.blame import said
from ddpm_deploy.model.facts import Fact, Facts, Said
from ddpm_deploy.model.family import Opened, State
from ddpm_deploy.model.spec_toml import OWN
from ddpm_deploy.model.tensors import check_numbers
from ddpm_deploy.noise import SeededNoise
from ddpm_deploy.parity import example_conditions
from ddpm_deploy.spec import ModelSpec

_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


class Timed(nn.Module):
    """A network that is given the index t in the form that it was trained with.

    Args:
        network: Called with (x, t, *conditions).
        convention: One of `spec_toml.CONVENTIONS`.
        T: Timesteps of training.
    """

    def __init__(self, network: nn.Module, convention: str, T: int) -> None:  # noqa: N803
        super().__init__()
        self.network = network
        self.convention, self.T = convention, T
        self.training = False  # not by eval(), which programs of torch.export refuse

    def forward(self, x: Tensor, t: Tensor, *conditions: Tensor) -> Tensor:
        """Returns the network's output; t is int64, the index."""
        if self.convention != "index":
            t = t.to(torch.float32)
        if self.convention == "fraction":
            t = t / self.T
        return cast("Tensor", self.network(x, t, *conditions))


@dataclass(frozen=True, kw_only=True)
class OwnNetwork:
    """A user's network with its weights.

    Attributes:
        network: In evaluation mode; called with (x, t, *conditions), t the index.
        spec: What it is; `spec.network` says how it was made.
        facts: Of its making: the factory and its arguments.
    """

    network: nn.Module
    spec: ModelSpec
    facts: tuple[Fact, ...]


def check_model(model: str | None, spec: ModelSpec | None, path: Path) -> None:
    """Compares what the user names with what a spec needs.

    Args:
        model: `package.module:factory`, or None.
        spec: What the network is, where anything says so.
        path: The checkpoint, for errors.

    Raises:
        CheckpointError: One is there without the other.
    """
    own = spec is not None and spec.family == OWN
    if model is None and own:
        assert spec is not None
        named = str(spec.network.get("model", ""))
        call = f"{named}({_shown(spec.network.get('arguments', {}))})"
        made = f", which {call} makes" if _NAME.fullmatch(named) else ""
        raise CheckpointError(
            f"{path} holds the weights of a network of your own{made}. ddpm-deploy runs your code "
            "only where you name it, never because a file does.",
            hint=f"Add: --model {named if _NAME.fullmatch(named) else 'package.module:factory'}",
        )
    if model is not None and spec is None:
        raise CheckpointError(
            f"--model {model} makes the network; nothing says its samples and its schedule.",
            hint="Write them into a file, and add: --spec spec.toml (docs/own-networks.md)",
        )
    if model is not None and not own:
        assert spec is not None
        raise CheckpointError(
            f"{path} is of the family {spec.family}, whose network is known; --model is for "
            "networks of your own.",
            hint="Leave --model out.",
        )


def load_own(
    opened: Opened, spec: ModelSpec, model: str, settings: Mapping[str, Any]
) -> OwnNetwork:
    """Makes a user's network, and loads its weights strictly.

    Args:
        opened: The checkpoint.
        spec: What the network is.
        model: `package.module:factory`.
        settings: Arguments of the factory, instead of those in the spec.

    Raises:
        CheckpointError: The code cannot be imported, fails or gives something else; or the weights
            do not fit; or the network does not take what the spec says.
    """
    factory = _factory(model)
    arguments, facts = _arguments(factory, model, spec, settings)
    network = _made(factory, model, arguments)
    _load(network, opened, model)
    spec = spec.with_changes(
        network={**spec.network, "model": model, "arguments": arguments},
    )
    timed = Timed(network, str(spec.network.get("timestep", "index")), spec.schedule.T)
    check_call(timed, spec, f"The network of {model}")
    return OwnNetwork(network=timed, spec=spec, facts=facts)


def check_call(network: nn.Module, spec: ModelSpec, what: str) -> None:
    """Calls a network as the exporter and the loop will.

    Args:
        network: Called with (x, t, *conditions).
        spec: What it is said to be.
        what: What to call it in errors.

    Raises:
        CheckpointError: It fails, gives another shape, or other numbers each time.
    """
    last = spec.schedule.T - 1
    conditions = example_conditions(spec, 2)
    x = torch.from_numpy(SeededNoise(0, range(2), spec.sample_shape)(0))
    t = torch.from_numpy(np.array([0, last], dtype=np.int64))
    inputs = [x, t, *map(torch.from_numpy, conditions.values())]
    names = ["x", "t", *conditions]
    given = ", ".join(
        f"{n} {str(v.dtype).removeprefix('torch.')} {tuple(v.shape)}"
        for n, v in zip(names, inputs, strict=True)
    )
    form = spec.network.get("timestep", "index")
    given += "" if form == "index" else f" ({form})"
    failed = f"{what} failed when it was called with {given}"
    with _users_code(failed, _SPEC_HINT), torch.inference_mode():
        first, second = network(*inputs), network(*inputs)
    shape = (2, *spec.output_shape)
    if not isinstance(first, Tensor):
        keys = f" of {', '.join(map(str, first))}"[:80] if isinstance(first, Mapping) else ""
        raise CheckpointError(
            f"{what} gives a {type(first).__name__}{keys}; it must give one tensor {shape}.",
            hint="Wrap it in a module that returns the tensor, and give that to --model.",
        )
    if tuple(first.shape) != shape:
        twice = tuple(first.shape[2:]) == shape[2:] and first.shape[1] == 2 * spec.sample_shape[0]
        raise CheckpointError(
            f"{what} gives {tuple(first.shape)} for x {tuple(x.shape)}; {shape} is what "
            "sample_shape and variance say.",
            hint='If half of it is the variance, write variance = "learned_range" in spec.toml.'
            if twice
            else "Correct sample_shape in spec.toml, or the network.",
        )
    if first.dtype != torch.float32:
        raise CheckpointError(
            f"{what} gives {first.dtype}; samples are float32.",
            hint="Return out.float(), and make the network in float32.",
        )
    if not torch.equal(first.nan_to_num(), second.nan_to_num()):
        raise CheckpointError(
            f"{what} gives other numbers each time that it is called with the same.",
            hint="Draw nothing inside of it in evaluation mode: no dropout by F.dropout(x), which "
            "wants training=self.training, and no noise.",
        )


_SPEC_HINT = (
    "It is called with (x, t, *conditions): compare sample_shape, timestep and [[conditions]] in "
    "spec.toml."
)


_OWN_HINT = "Load it in Python first: make().load_state_dict(torch.load('ckpt.pt'))"


def _factory(model: str) -> Callable[..., Any]:
    """Imports what makes the network."""
    if not _NAME.fullmatch(model):
        path, _, name = model.partition(":")
        module = re.sub(r"[\\/]+", ".", path.removesuffix(".py").removeprefix("./"))
        right = f"{module or 'mynet'}:{name or 'make'}"
        raise CheckpointError(
            f"--model is {model!r}; it must be package.module:factory.",
            hint=f"Type --model {right if _NAME.fullmatch(right) else 'mynet:make'}",
        )
    place, _, name = model.partition(":")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)  # as `python -m` does
    importlib.invalidate_caches()
    with _users_code(
        f"--model {model}: importing {place} failed",
        f"Type the command in the folder that holds {place.partition('.')[0]}, or put it on "
        "PYTHONPATH.",
    ):
        found: Any = importlib.import_module(place)
    there = found
    for part in name.split("."):
        if not hasattr(there, part):
            public = [n for n, v in vars(there).items() if callable(v) and not n.startswith("_")]
            near = difflib.get_close_matches(part, public, n=1) or public[:1] or ["make"]
            raise CheckpointError(
                f"--model {model}: {place} ({_file_of(found)}) has no {part}; it has "
                f"{', '.join(public[:12]) or 'nothing that can be called'}.",
                hint=f"Type --model {place}:{near[0]}",
            )
        there = getattr(there, part)
    if isinstance(there, nn.Module) or not callable(there):
        raise CheckpointError(
            f"--model {model} is a {type(there).__name__}; it must be a function, or a class, that "
            "makes the network.",
            hint=f"Write one in {place}: def make(): return {name}",
        )
    return cast("Callable[..., Any]", there)


def _arguments(
    factory: Callable[..., Any], model: str, spec: ModelSpec, settings: Mapping[str, Any]
) -> tuple[dict[str, Any], tuple[Fact, ...]]:
    """Returns the arguments of a factory: the spec's, but for what the user types."""
    given: Mapping[str, Any] = spec.network.get("arguments", {})
    known = _parameters(factory)
    places = {**dict.fromkeys(given, "[model] in spec.toml:"), **dict.fromkeys(settings, "--set")}
    for name, place in places.items():
        if known is not None and name not in known:
            raise CheckpointError(
                f"{place} {name} is no argument of {model}; it takes {', '.join(known) or 'none'}.",
                hint="Leave it out, or correct its name.",
            )
    facts = Facts(Said(settings=settings), source=f"--model {model}")
    arguments = {name: facts.found(name, value, "config") for name, value in given.items()}
    for name in settings:
        if name not in arguments:
            default = (known or {}).get(name)
            arguments[name] = facts.ask(name, _parsed(settings[name], default))
    found = [Fact(name="model", value=model, source="flag", option="--model"), *facts.all]
    return json.loads(json.dumps(arguments)), tuple(found)


def _parameters(factory: Callable[..., Any]) -> dict[str, Any] | None:
    """Returns the parameters of a factory with their defaults; None where it takes any name."""
    try:
        found = inspect.signature(factory).parameters
    except (TypeError, ValueError):  # C code that does not say
        return None
    if any(one.kind is one.VAR_KEYWORD for one in found.values()):
        return None
    return {
        name: None if one.default is one.empty else one.default
        for name, one in found.items()
        if one.kind in {one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY}
    }


def _parsed(text: Any, default: Any) -> Any:
    """Returns a value of the kind that was typed for an argument which spec.toml leaves out."""
    if isinstance(default, bool | int | float | str | tuple):
        return default
    try:
        return json.loads(str(text))
    except ValueError:
        return text


def _made(factory: Callable[..., Any], model: str, arguments: Mapping[str, Any]) -> nn.Module:
    call = f"{model}({_shown(arguments)})"
    hint = "Its arguments stand below [model] in spec.toml, or in --set NAME=VALUE."
    with _users_code(f"{call} failed", hint):
        network = factory(**arguments)
    if not isinstance(network, nn.Module):
        raise CheckpointError(
            f"{call} gives a {type(network).__name__}; it must give a torch.nn.Module.",
            hint="Let it return the network.",
        )
    with _users_code(f"{call} gave a network that cannot be put into evaluation mode", hint):
        return network.to(device="cpu", dtype=torch.float32).eval().requires_grad_(False)


def _load(network: nn.Module, opened: Opened, model: str) -> None:
    with _users_code(f"The network of {model} does not give its state_dict()", _OWN_HINT):
        wanted: dict[str, Tensor] = dict(network.state_dict())
    try:
        state = fitted(opened.state, wanted)
        # What was taken for a wrapping may be the network's own; never the other weights.
        alone = len(opened.choices) == 1 and state.keys() != wanted.keys()
        if alone and (whole := fitted(opened.whole, wanted)).keys() == wanted.keys():
            state = whole
    except ValueError as error:
        raise CheckpointError(
            f"{opened.path} holds several networks that fit: {error}.",
            hint="Save the one that is meant alone: torch.save(model.NAME.state_dict(), 'ckpt.pt')",
        ) from error
    problems = list(_differences(state, wanted))
    if problems:
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise CheckpointError(
            f"The {opened.weights} weights of {opened.path} do not fit the network of {model}: "
            f"{'; '.join(problems[:4])}{more}.",
            hint="Make the network with the arguments that it was trained with: [model] in "
            "spec.toml, or --set NAME=VALUE.",
        )
    check_numbers(state, opened.path, integers=True)
    with _users_code(f"{opened.path} cannot be loaded into the network of {model}", _OWN_HINT):
        network.load_state_dict(
            {k: v.float() if v.is_floating_point() else v for k, v in state.items()}, strict=True
        )


def fitted(state: State, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a state dict under the names that a network has, as far as a prefix explains them.

    A file may hold the network as a part of something larger (`model.` beside a loss), and a
    network's own names may begin with what looks like a wrapper's prefix. What else stands under
    the prefix comes along, and fits nowhere.

    Raises:
        ValueError: Several prefixes do; names them.
    """
    if not wanted or state.keys() == wanted.keys():
        return dict(state)
    longest = max(wanted, key=len)
    ending = [name.removesuffix(longest) for name in state if name.endswith(f".{longest}")]
    prefixes = [prefix for prefix in ending if all(prefix + key in state for key in wanted)]
    if len(prefixes) > 1:
        raise ValueError(", ".join(prefix.rstrip(".") for prefix in prefixes))
    if prefixes:
        found = [key for key in state if key.startswith(prefixes[0])]
        return {key.removeprefix(prefixes[0]): state[key] for key in found}
    for name in state:
        if longest.endswith(f".{name}"):
            prefix = longest.removesuffix(name)
            if {prefix + key for key in state} == wanted.keys():
                return {prefix + key: value for key, value in state.items()}
    return dict(state)


def _differences(state: State, wanted: Mapping[str, Tensor]) -> Iterator[str]:
    for name, value in wanted.items():
        if name not in state:
            yield f"{name} {tuple(value.shape)} is missing in the file"
    for name, value in state.items():
        if name not in wanted:
            yield f"the file has {name} {tuple(value.shape)} besides"
        elif value.shape != wanted[name].shape:
            shape = tuple(wanted[name].shape)
            yield f"{name} is {tuple(value.shape)} in the file and {shape} in the network"
        elif wanted[name].is_floating_point() and not value.is_floating_point():
            yield f"{name} is {value.dtype} in the file and {wanted[name].dtype} in the network"


@contextmanager
def _users_code(what: str, hint: str) -> Iterator[None]:
    """Runs a user's code: what it prints goes to stderr, what it raises becomes one message."""
    try:
        with redirect_stdout(sys.stderr):
            yield
    except (Exception, SystemExit) as error:
        raise CheckpointError(f"{what}: {said(error)}", hint=hint) from error


def _shown(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())


def _file_of(module: Any) -> str:
    return shlex.quote(str(getattr(module, "__file__", None) or "no file"))
