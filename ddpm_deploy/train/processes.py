"""The processes and devices of a run, through Lightning Fabric."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from lightning_fabric import Fabric

from ddpm_deploy.errors import TrainError
from ddpm_deploy.train.settings import Precision

_PLUGIN: dict[Precision, Literal["32-true", "bf16-mixed", "16-mixed"]] = {
    "32": "32-true",
    "bf16": "bf16-mixed",
    "16": "16-mixed",
}


def choose_device(wanted: str, *, threads: int | None = None) -> Literal["cpu", "cuda"]:
    """Returns the kind of device to train on.

    Args:
        wanted: `cpu`, `cuda`, or `auto` for CUDA where there is one.
        threads: CPU threads of this process; PyTorch's choice when None.

    Raises:
        TrainError: There is no such device here.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    match wanted:
        case "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        case "cpu":
            return "cpu"
        case "cuda":
            if not torch.cuda.is_available():
                raise TrainError(
                    f"PyTorch {torch.__version__} sees no CUDA device here.",
                    hint="Train on the CPU: --device cpu; or install PyTorch for your CUDA.",
                )
            return "cuda"
        case _:
            raise TrainError(
                f"The device is {wanted!r}; there are cpu, cuda and auto.",
                hint="Type --device auto, or leave it out.",
            )


def choose_precision(wanted: str, device: Literal["cpu", "cuda"]) -> Precision:
    """Returns the precision to train with.

    Args:
        wanted: `32`, `bf16`, `16`, or `auto` for mixed precision where the device gains by it.
        device: Where the run is.

    Raises:
        TrainError: The device has no such precision.
    """
    match wanted:
        case "auto":
            if device == "cpu":
                return "32"
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "16"
        case "16" if device == "cpu":
            raise TrainError(
                "Mixed float16 needs a GPU; the CPU trains with 32 or bf16.",
                hint="Type --precision 32, or leave it out.",
            )
        case "32" | "bf16" | "16":
            return wanted
        case _:
            raise TrainError(
                f"The precision is {wanted!r}; there are 32, bf16, 16 and auto.",
                hint="Type --precision auto, or leave it out.",
            )


def is_leader() -> bool:
    """Tells whether this process is the one that writes and speaks, before and after launch."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))) == 0


@contextmanager
def open_fabric(
    device: Literal["cpu", "cuda"], precision: Precision, *, devices: int = 1
) -> Iterator[Fabric]:
    """Starts the other processes of the run, and ends the group afterwards.

    Under torchrun they are there already, and their number is torchrun's.

    Args:
        device: Kind of device.
        precision: Of the network's arithmetic; weights and optimizer stay float32.
        devices: Processes on this machine, one a device.

    Raises:
        TrainError: The machine has fewer devices.
    """
    nodes = 1
    if "TORCHELASTIC_RUN_ID" in os.environ:
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // devices
    if device == "cuda" and devices > torch.cuda.device_count():
        raise TrainError(
            f"{devices} GPUs were asked for; this machine has {torch.cuda.device_count()}.",
            hint=f"Type --devices {torch.cuda.device_count()}",
        )
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it greets on every start
    fabric = Fabric(
        accelerator=device,
        devices=devices,
        num_nodes=nodes,
        strategy="ddp" if devices * nodes > 1 else "auto",
        precision=_PLUGIN[precision],
    )
    fabric.launch()
    try:
        yield fabric
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
