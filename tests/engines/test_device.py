from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ddpm_deploy.engines.device import Device, find_device
from ddpm_deploy.errors import EngineError

driver = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")

ORIN = {75: 8, 76: 7, 18: 1}
"""Attributes by their numbers in cuda.h: compute capability major and minor, integrated."""


def answer(monkeypatch: pytest.MonkeyPatch, *, start: Any = None) -> None:
    """Makes the driver answer as that of an Orin Nano would, after cuInit gave `start`."""
    good = driver.CUresult.CUDA_SUCCESS
    calls = SimpleNamespace(
        cuInit=lambda _: (good if start is None else start,),
        cuDeviceGet=lambda number: (good, number),
        cuDeviceGetName=lambda length, _: (good, b"Orin (nvgpu)".ljust(length, b"\0")),
        cuDeviceTotalMem=lambda _: (good, 7990 * 2**20),
        cuDriverGetVersion=lambda: (good, 12060),
        cuDeviceGetAttribute=lambda which, _: (good, ORIN[int(which)]),
    )
    for name, call in vars(calls).items():
        monkeypatch.setattr(driver, name, call)


def test_a_gpu_is_described_by_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch)
    assert find_device() == Device(
        name="Orin (nvgpu)",
        compute_capability="8.7",
        memory=7990 * 2**20,
        integrated=True,
        driver="12.6",
    )


def test_a_driver_without_a_gpu_finds_none(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, start=driver.CUresult.CUDA_ERROR_NO_DEVICE)
    assert find_device() is None


def test_a_driver_that_fails_is_an_error_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, start=driver.CUresult.CUDA_ERROR_SYSTEM_DRIVER_MISMATCH)
    with pytest.raises(EngineError, match="cuInit gives CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"):
        find_device()


def test_without_a_driver_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: int) -> None:  # as cuda.pathfinder's DynamicLibNotFoundError
        raise RuntimeError("libcuda.so.1")

    monkeypatch.setattr(driver, "cuInit", missing)
    assert find_device() is None
