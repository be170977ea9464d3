"""What lucidrains/denoising-diffusion-pytorch and its users save, taken out of its wrapping."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ddpm_deploy.model.family import Opened, State, Weights
from ddpm_deploy.model.wrapping import choose_weights, has_tensors, strip_prefixes

BUFFERS = frozenset(
    {"betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod"}
    | {"sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod"}
    | {"sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance"}
    | {"posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"}
    | {"loss_weight", "p2_loss_weight"}
)
"""What GaussianDiffusion holds besides the network: numbers for each timestep."""

_ONLINE = ("model", "model_state_dict", "state_dict", "diffusion", "unet", "net")
_EMA = ("ema", "ema_model")


def unwrap(content: Any, path: Path, weights: Weights | None) -> Opened | None:
    """Takes the network and its diffusion's buffers out of a file; None where it has no buffers.

    Args:
        content: Of the file: what Trainer saved, what an EMA module of ema-pytorch holds, or what a
            GaussianDiffusion holds, under a key or by itself.
        path: Its path.
        weights: `ema`, `online`, or the better of what is there.

    Returns:
        The UNet's tensors by their names in it, and the buffers by theirs.

    Raises:
        CheckpointError: It does not hold these weights.
    """
    if _has_nested_ema(content):
        return None
    found: dict[Weights, State] = {}
    plain = True
    for kind, part in _parts(content, path):
        state = strip_prefixes(part)
        buffers = {name: state.pop(name) for name in BUFFERS & state.keys()}
        beside = {name: state[name] for name in state if buffers and not name.startswith("model.")}
        state = strip_prefixes({name: state[name] for name in state.keys() - beside.keys()})
        if kind not in found and {"init_conv.weight", "time_mlp.1.weight"} <= state.keys():
            found[kind] = {**state, **beside, **buffers}
            plain = plain and not buffers
    if not found or (plain and not _is_trainer(content)):
        return None
    taken = choose_weights(found, path, weights)
    return Opened(
        path=path,
        state=found[taken],
        weights=taken,
        choices=tuple(found),
        content=content,
    )


def own_weights(state: State, *, axes: int, standardise: str) -> dict[str, Tensor]:
    """Returns a UNet's weights under the names, and in the shapes, of `LucidrainsUnet`.

    Args:
        state: As a file has them, of any release.
        axes: 2 for pictures, 1 for sequences.
        standardise: How the release standardises the weights of the blocks at every call: `add`,
            `clamp` or empty.
    """
    own: dict[str, Tensor] = {}
    for name, tensor in state.items():
        new, value = name.replace(".fn.fn.", ".").replace(".fn.norm.", ".norm."), tensor
        if axes == 2 and (unshuffled := re.fullmatch(r"(downs\.\d+\.3)\.1\.(weight|bias)", new)):
            new = ".".join(unshuffled.groups())
            if value.ndim == 4:  # its input channels are (c, row, column)
                value = value.reshape(len(value), -1, 2, 2)
        elif standardise and re.search(r"\.block[12]\.proj\.weight$", new):
            value = _standardised(value.float(), clamp=standardise == "clamp")
        own[new] = value
    return own


def _standardised(weight: Tensor, *, clamp: bool) -> Tensor:
    """Returns weights with mean 0 and variance 1 in each filter (Qiao et al. 2019)."""
    inputs = tuple(range(1, weight.ndim))
    mean = weight.mean(dim=inputs, keepdim=True)
    variance = weight.var(dim=inputs, keepdim=True, unbiased=False)
    return (weight - mean) * (variance.clamp(min=1e-5) if clamp else variance + 1e-5).rsqrt()


def _parts(content: Any, path: Path) -> list[tuple[Weights, Mapping[str, Any]]]:
    """Returns what in a file may be a network, the better first."""
    if not isinstance(content, Mapping):
        return []
    online = [content[key] for key in _ONLINE if has_tensors(content.get(key))]
    ema = [content[key] for key in _EMA if has_tensors(content.get(key))]
    if not online and not ema and has_tensors(content):
        if any(str(key).startswith("ema_model.") for key in content):
            ema = [content]
        else:
            return [("ema" if path.name.startswith("ema") else "online", content)]
    parts: list[tuple[Weights, Mapping[str, Any]]] = []
    for module in ema:
        inside = {kind: _below(module, f"{kind}_model.") for kind in ("ema", "online")}
        # Before ema-pytorch, the copy itself was saved.
        parts.append(("ema", inside["ema"] or module))
        online.append(inside["online"])
    return [*parts, *(("online", part) for part in online if part)]


def _has_nested_ema(content: Any) -> bool:
    """Tells an average of another form, `{decay, shadow: {...}}`, which is not ema-pytorch's."""
    averages = [content.get(key) for key in _EMA] if isinstance(content, Mapping) else []
    return any(
        isinstance(average, Mapping) and any(map(has_tensors, average.values()))
        for average in averages
    )


def _below(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)}


def _is_trainer(content: Any) -> bool:
    return isinstance(content, Mapping) and {"step", "model", "ema"} <= content.keys()
