"""The GPU of this machine, as the CUDA driver describes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ddpm_deploy.engines.base import needs
from ddpm_deploy.engines.flavour import extra
from ddpm_deploy.errors import EngineError


@dataclass(frozen=True, kw_only=True)
class Device:
    """A GPU.

    Attributes:
        name: As its maker calls it.
        compute_capability: `8.7`.
        memory: All of its memory, in bytes; of an integrated GPU, the machine's.
        integrated: Whether it shares the processor's memory, as on a Jetson.
        driver: The latest CUDA that its driver knows: `13.0`.
    """

    name: str
    compute_capability: str
    memory: int
    integrated: bool
    driver: str


def find_device() -> Device | None:
    """Returns the first GPU; None where there is no driver, or it finds no GPU.

    Raises:
        EngineError: The driver is there and fails.
        MissingDependencyError: cuda-bindings is not installed.
    """
    with needs("cuda-bindings", extra=extra("tensorrt")):
        from cuda.bindings import driver

    def check(status: Any, call: str) -> None:
        if status != driver.CUresult.CUDA_SUCCESS:
            raise EngineError(
                f"The CUDA driver fails: {call} gives {status.name}.",
                hint="Check it with nvidia-smi and ddpm-deploy doctor; after an update of the "
                "driver, start the machine anew.",
            )

    try:
        (status,) = driver.cuInit(0)
    except RuntimeError:  # the driver's library is not on this machine
        return None
    if status == driver.CUresult.CUDA_ERROR_NO_DEVICE:
        return None
    check(status, "cuInit")
    status, number = driver.cuDeviceGet(0)
    check(status, "cuDeviceGet")
    attribute = driver.CUdevice_attribute
    status, name = driver.cuDeviceGetName(128, number)
    check(status, "cuDeviceGetName")
    status, memory = driver.cuDeviceTotalMem(number)
    check(status, "cuDeviceTotalMem")
    status, version = driver.cuDriverGetVersion()
    check(status, "cuDriverGetVersion")
    values = []
    for which in (
        attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
        attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        attribute.CU_DEVICE_ATTRIBUTE_INTEGRATED,
    ):
        status, value = driver.cuDeviceGetAttribute(which, number)
        check(status, "cuDeviceGetAttribute")
        values.append(int(value))
    return Device(
        name=name.split(b"\0")[0].decode(errors="replace"),
        compute_capability=f"{values[0]}.{values[1]}",
        memory=int(memory),
        integrated=bool(values[2]),
        driver=f"{version // 1000}.{version % 1000 // 10}",
    )
