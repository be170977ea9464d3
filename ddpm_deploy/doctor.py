"""What this machine can do: packages, devices, and the commands that they allow."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

from ddpm_deploy.errors import DDPMDeployError

JETSON_RELEASE = Path("/etc/nv_tegra_release")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked for.

    Attributes:
        what: Its name.
        ok: Whether it is there and works.
        detail: Version or reason.
        fix: What to type to get it; empty when it is there.
    """

    what: str
    ok: bool
    detail: str
    fix: str = ""


def machine() -> dict[str, Any]:
    """Describes the machine: names, versions, cores, memory in bytes; JSON's types."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "platform": platform.platform(),
        "processor": platform.machine(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "memory": memory,
        "free_disk": shutil.disk_usage(Path.cwd()).free,
        "jetson": _jetson(),
    }


def findings() -> list[Finding]:
    """Looks for every runtime and package that a command may need; opens devices to be sure."""
    found = [_package("numpy", "", "ddpm-deploy"), *_onnxruntime()]
    found += [
        _package("torch", "export", "export, verify against a checkpoint"),
        _package("onnx", "export", "export"),
        _package("onnxscript", "export", "export"),
        _package("lightning_fabric", "train", "train", "lightning-fabric"),
        _package("tensorboard", "train", "train"),
    ]
    return found


def can_run(found: list[Finding]) -> bool:
    """Tells whether some engine can run here."""
    return any(f.ok for f in found if f.what in {"onnxruntime CPU", "torch"})


def _package(module: str, extra: str, use: str, distribution: str | None = None) -> Finding:
    if util.find_spec(module) is None:
        return Finding(
            what=module,
            ok=False,
            detail=f"not installed; for {use}",
            fix=f"pip install 'ddpm-deploy[{extra}]'",
        )
    return Finding(what=module, ok=True, detail=_version(distribution or module))


def _onnxruntime() -> list[Finding]:
    if util.find_spec("onnxruntime") is None:
        return [
            Finding(
                what="onnxruntime CPU",
                ok=False,
                detail="not installed; for build, sample, verify",
                fix="pip install 'ddpm-deploy[cpu]' (or [gpu] with an NVIDIA GPU)",
            )
        ]
    try:
        import onnxruntime
    except ImportError as error:  # there, but not for this Python, NumPy or C library
        return [
            Finding(
                what="onnxruntime CPU",
                ok=False,
                detail=f"installed, but cannot be imported: {error}",
                fix="pip install --force-reinstall 'ddpm-deploy[cpu]'",
            )
        ]

    providers = onnxruntime.get_available_providers()
    version = onnxruntime.__version__
    found = [Finding(what="onnxruntime CPU", ok=True, detail=version)]
    if "CUDAExecutionProvider" in providers:
        try:
            _start_cuda()
            found.append(Finding(what="onnxruntime CUDA", ok=True, detail=version))
        except DDPMDeployError as error:
            found.append(
                Finding(what="onnxruntime CUDA", ok=False, detail=str(error), fix=error.hint)
            )
    return found


def _start_cuda() -> None:
    """Starts the CUDA driver, which ONNX Runtime only tries when it opens a network.

    Raises:
        DDPMDeployError: There is no driver, or no device.
    """
    import ctypes  # noqa: PLC0415

    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise DDPMDeployError(
            "no NVIDIA driver (libcuda.so.1 is missing)", hint="Install the driver, or use the CPU."
        ) from error
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        raise DDPMDeployError("the NVIDIA driver finds no GPU", hint="Check: nvidia-smi")


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "version unknown"


def _jetson() -> str | None:
    if not JETSON_RELEASE.is_file():
        return None
    return JETSON_RELEASE.read_text(encoding="utf-8", errors="replace").splitlines()[0].strip("# ")
