"""What checkpoints wrap a network in: dictionaries, modules around it, averages beside it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ddpm_deploy.errors import CheckpointError
from ddpm_deploy.model.family import Weights
from ddpm_deploy.model.foreign import check_content, list_without_names

WRAPPERS: Mapping[Weights, tuple[str, ...]] = {
    "ema": (
        *("ema", "ema_model", "model_ema", "state_dict_ema", "ema_state_dict"),
        *("model_ema_state_dict", "params_ema", "ema_params", "ema_net", "ema_unet", "net_ema"),
    ),
    "online": (
        *("model", "model_state_dict", "state_dict", "unet", "net", "net_model"),
        *("model_state", "network", "denoiser", "params", "module", "weights"),
        *("unet_state_dict", "net_state_dict", "network_state_dict"),
    ),
}
"""Keys under which files keep a network."""

GROUPS: Mapping[Weights, tuple[str, ...]] = {
    "ema": ("ema_model", "model_ema", "ema_unet", "ema_net", "net_ema", "unet_ema", "ema"),
    "online": (
        *("online_model", "model", "net", "unet", "network", "denoiser", "module"),
        *("diffusion_model", "eps_model", "noise_predictor"),
    ),
}
"""Attributes under which modules keep a network, beside losses, metrics and buffers."""

_PREFIXES = ("module.", "_orig_mod.", "model.", "unet.", "ema_model.")

_EMA = re.compile(r"(?<![a-z])ema(?![a-z])|EMA|shadow|averaged", re.MULTILINE)
_NO_NETWORK = re.compile(r"optim|^opt$|sched|scaler|^loops$|^state$|param_groups|hyper_param|rng")
_DEEPEST = 5
_MOST = 1000


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
    while state and (
        prefix := next((p for p in _PREFIXES if all(k.startswith(p) for k in state)), "")
    ):
        state = {k.removeprefix(prefix): v for k, v in state.items()}
    return state


@dataclass(frozen=True)
class Part:
    """A dictionary of tensors somewhere in a file.

    Attributes:
        key: Where, its keys joined by dots; empty for the file's own.
        tensors: What it holds.
    """

    key: str
    tensors: Mapping[str, Any]


@dataclass(frozen=True)
class Unwrapped:
    """The weights of a file.

    Attributes:
        found: By what they are, at least one.
        whole: The tensors they were taken from, under their full names.
        named: Whether the file says which weights they are.
    """

    found: Mapping[Weights, Mapping[str, Any]]
    whole: Mapping[str, Any]
    named: bool


def unwrap(
    content: Any,
    path: Path,
    weights: Weights | None,
    known: Callable[[Mapping[str, Any]], bool],
    key: str = "",
) -> Unwrapped:
    """Finds the network in what a file holds.

    Args:
        content: What it holds.
        path: The file, for errors.
        weights: Which weights are asked for.
        known: Tells whether a dictionary of tensors is a network of a family, as it stands.
        key: Of the network, where the user names one of several.

    Raises:
        CheckpointError: There is none, or there are several, or its weights have no names.
    """
    check_content(content, str(path), str(_sibling(path)))
    parts = list(_parts(content))
    if key:
        return _chosen(parts, key, path)
    found = _by_words(parts, path)
    _check_lists(content, path, weights, others=bool(found))
    own = has_tensors(content)
    if not found and own and (len(parts) == 1 or known(content)):
        return _split({}, content, known, default="ema" if path.name.startswith("ema") else None)
    if not found and own:
        inner = [part for part in parts if part.key]
        if len(inner) != 1 or len(inner[0].tensors) < len(parts[0].tensors):
            return _split({}, content, known)
    if not found:
        found = _unnamed([part for part in parts if part.key], path)
    if not found:
        keys = ", ".join(map(str, list(content)[:5]))
        raise CheckpointError(
            f"{path} holds no tensors; its keys are {keys}.",
            hint="Save the weights: torch.save(model.state_dict(), 'ckpt.pt')",
        )
    if "ema" not in found:
        found |= _ema_elsewhere(parts, found["online"])
    whole = found.get(weights or "ema", next(iter(found.values()))).tensors
    return _split({kind: part.tensors for kind, part in found.items()}, whole, known)


def _parts(content: Any, key: str = "", depth: int = 0) -> Iterator[Part]:
    """Yields every dictionary of tensors, outer before inner; optimizers' are left out."""
    left: list[tuple[Any, str, int]] = [(content, key, depth)]
    for _ in range(_MOST):  # dictionaries that hold themselves would never end
        if not left:
            return
        one, here, deep = left.pop(0)
        if not isinstance(one, Mapping):
            continue
        if has_tensors(one):
            yield Part(here, one)
        if deep < _DEEPEST:
            left += [
                (value, f"{here}.{name}".lstrip("."), deep + 1)
                for name, value in one.items()
                if isinstance(name, str)
                and isinstance(value, Mapping)
                and not _NO_NETWORK.search(name)
            ]


def _by_words(parts: Sequence[Part], path: Path) -> dict[Weights, Part]:
    """Returns the parts that lie under a key which says what they are."""
    found: dict[Weights, Part] = {}
    for kind, words in WRAPPERS.items():
        for word in words:
            inside = [p for p in parts if p.key == word or p.key.startswith(f"{word}.")]
            if kind in found or not inside:
                continue
            if inside[0].key == word or len(inside) == 1:
                found[kind] = inside[0]
            else:
                found |= {k: v for k, v in _unnamed(inside, path).items() if k not in found}
    return found


def _unnamed(inner: Sequence[Part], path: Path) -> dict[Weights, Part]:
    """Returns the parts under other keys, where it is plain which is the network."""
    averaged = [part for part in inner if _EMA.search(part.key)]
    others = [part for part in inner if part not in averaged]
    if len(averaged) <= 1 and len(others) <= 1:
        found: dict[Weights, Part] = {}
        if averaged:
            found["ema"] = averaged[0]
        if others:
            found["online"] = others[0]
        return found
    shown = ", ".join(f"{part.key} ({len(part.tensors)} tensors)" for part in inner[:6])
    raise CheckpointError(
        f"{path} holds several networks: {shown}.",
        hint=f"Name the one that samples: --set key={inner[0].key}",
    )


def _ema_elsewhere(parts: Sequence[Part], online: Part) -> dict[Weights, Part]:
    """Returns an average that a callback keeps: the same names and shapes, under such a key."""
    wanted = {k: v.shape for k, v in online.tensors.items() if isinstance(v, Tensor)}
    for part in parts:
        shapes = {k: v.shape for k, v in part.tensors.items() if isinstance(v, Tensor)}
        if part is not online and _EMA.search(part.key) and shapes == wanted:
            return {"ema": part}
    return {}


def _chosen(parts: Sequence[Part], key: str, path: Path) -> Unwrapped:
    part = next((part for part in parts if part.key == key), None)
    if part is None:
        keys = ", ".join(part.key for part in parts if part.key) or "none"
        raise CheckpointError(
            f"{path} holds no tensors under {key}; it does under {keys}.",
            hint="Type one of them: --set key=NAME, or leave it out.",
        )
    kind: Weights = "ema" if _EMA.search(key) else "online"
    return Unwrapped({kind: part.tensors}, part.tensors, named=True)


def _split(
    found: Mapping[Weights, Mapping[str, Any]],
    whole: Mapping[str, Any],
    known: Callable[[Mapping[str, Any]], bool],
    default: Weights | None = None,
) -> Unwrapped:
    """Takes networks out of the modules around them (`model.` beside a loss's buffers)."""
    named = bool(found)
    result: dict[Weights, Mapping[str, Any]] = {}
    for kind, tensors in (found or {default or "online": whole}).items():
        groups = {} if known(tensors) else _groups(tensors)
        if kind == "ema" and set(groups) == {"online"}:
            groups = {"ema": groups["online"]}
        for each, group in groups.items():
            if each == kind or each not in found:
                result.setdefault(each, group)
                named = named or each == "ema"
        if not groups:
            result[kind] = tensors
    return Unwrapped({k: result[k] for k in ("ema", "online") if k in result}, whole, named)


def _groups(tensors: Mapping[str, Any], depth: int = 0) -> dict[Weights, Mapping[str, Any]]:
    """Returns the networks among a module's tensors by the attributes that hold them."""
    found: dict[Weights, Mapping[str, Any]] = {}
    names = [k for k, v in tensors.items() if isinstance(k, str) and isinstance(v, Tensor)]
    tops = {name.partition(".")[0] for name in names if "." in name}
    for kind, words in GROUPS.items():
        word = next((word for word in words if word in tops), None)
        if word is not None and kind not in found:
            inside = {n.partition(".")[2]: tensors[n] for n in names if n.startswith(f"{word}.")}
            deeper = _groups(inside, depth + 1) if depth < _DEEPEST else {}
            found[kind] = next(iter(deeper.values()), inside)
    if "n_averaged" in tensors and "online" in found and "ema" not in found:
        found = {"ema": found["online"]}  # torch.optim.swa_utils.AveragedModel
    if "ema" in found and "online" in found:
        found["ema"] = _dotted(found["ema"], found["online"])
    return found


def _dotted(ema: Mapping[str, Any], online: Mapping[str, Any]) -> Mapping[str, Any]:
    """Gives CompVis' LitEma its dots back: it keeps `model_ema.convweight` for `conv.weight`."""
    if any("." in name for name in ema):
        return ema
    dotted = {name.replace(".", ""): name for name in online}
    return {dotted[name]: value for name, value in ema.items() if name in dotted} or ema


def _check_lists(content: Any, path: Path, weights: Weights | None, *, others: bool) -> None:
    """Refuses averages that are lists without names, where they would be taken."""
    if weights == "online" and others:
        return
    places = [("shadow_params", content)]
    places += [
        (f"{key}.shadow_params", value)
        for key, value in content.items()
        if isinstance(value, Mapping)
    ]
    for where, holder in places:
        if isinstance(holder.get("shadow_params"), list | tuple):
            raise list_without_names(str(path), where, others=others)


def has_tensors(mapping: Any) -> bool:
    """Tells whether something is a dictionary with tensors by name."""
    return isinstance(mapping, Mapping) and any(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in mapping.items()
    )


def _sibling(path: Path) -> Path:
    """Returns the weights that an optimizer's file belongs to: the EMA's, of the same step."""
    step = re.search(r"\d+$", path.stem)
    ending = f"{step[0] if step else ''}.pt"
    for name in ("ema_ckpt.pt", f"ema_*{ending}", "ckpt.pt", f"model*{ending}"):
        if found := sorted(path.parent.glob(name)):
            return found[-1]
    return path.parent / "ckpt.pt"
