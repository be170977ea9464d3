"""What a checkpoint's tensors must be: plain arrays of finite numbers."""

from __future__ import annotations

from pathlib import Path

import torch

from ddpm_deploy.errors import CheckpointError
from ddpm_deploy.model.family import State

_LARGEST = 2**28
"""Numbers in a tensor above which its memory is compared with what the file has of it."""


def check_tensors(state: State, path: Path) -> None:
    """Refuses tensors that are no plain arrays of numbers.

    Args:
        state: A network's.
        path: The checkpoint, for errors.

    Raises:
        CheckpointError: One is sparse, quantised, without data, or claims more than there is.
    """
    for name, tensor in state.items():
        what = ""
        if tensor.is_meta:
            what = "no numbers, a tensor on torch's meta device,"
        elif tensor.is_quantized:
            what = f"quantised numbers ({tensor.dtype})"
        elif tensor.layout != torch.strided:
            what = f"a sparse tensor ({tensor.layout})"
        elif tensor.is_complex():
            what = f"{tensor.dtype}"
        elif tensor.numel() > _LARGEST and tensor.numel() * tensor.element_size() > (
            tensor.untyped_storage().nbytes()
        ):
            what = f"{tensor.numel()} numbers that share {tensor.untyped_storage().nbytes()} bytes"
        if what:
            raise CheckpointError(
                f"{path} holds {what} in {name}; weights are floating-point numbers.",
                hint="Save dense float32 weights: torch.save({k: v.float() for k, v in "
                "model.state_dict().items()}, 'ckpt.pt')",
            )


def check_numbers(state: State, path: Path, *, integers: bool = False) -> None:
    """Refuses weights that are not finite floating-point numbers.

    Args:
        state: A network's.
        path: The checkpoint, for errors.
        integers: Whether whole numbers may be among them, as BatchNorm's counters are.

    Raises:
        CheckpointError: One is not.
    """
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            if integers:
                continue
            raise CheckpointError(
                f"{path} holds {tensor.dtype} in {name}; weights are floating-point numbers.",
                hint="Quantised weights cannot be exported: take the file that was trained.",
            )
        finite = torch.isfinite(tensor if tensor.element_size() > 1 else tensor.float())
        if not bool(finite.all()):
            wrong = int((~finite).sum())
            raise CheckpointError(
                f"{path} has numbers that are not finite: {wrong} of {tensor.numel()} in {name}.",
                hint="Training diverged before this was saved; take an earlier checkpoint.",
            )
