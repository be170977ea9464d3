"""A process of its own that starts the CUDA driver, or imports one package, and says how it went.

A broken driver or library can kill the process that opens it; so `doctor` has this one do it.
Run as a file, not as a module, since it must not need the package around it.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import sys
from typing import Any

# CUdevice_attribute of the CUDA driver API.
INTEGRATED, MAJOR, MINOR = 18, 75, 76


def cuda() -> dict[str, Any]:
    """Starts the CUDA driver; gives the CUDA version that it runs, and its devices."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return {"error": "there is no NVIDIA driver (libcuda.so.1 is missing)"}
    code = driver.cuInit(0)
    if code:
        name = ctypes.c_char_p()
        driver.cuGetErrorName(code, ctypes.byref(name))
        return {"error": f"cuInit gives {(name.value or b'an error').decode()} ({code})"}
    version, count = ctypes.c_int(), ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    driver.cuDeviceGetCount(ctypes.byref(count))
    return {
        "cuda": f"{version.value // 1000}.{version.value % 1000 // 10}",
        "gpus": [_gpu(driver, number) for number in range(count.value)],
    }


def package(name: str) -> dict[str, Any]:
    """Imports a package; gives its version and, of ONNX Runtime, its providers."""
    try:
        module = importlib.import_module(name)
        providers: list[str] = getattr(module, "get_available_providers", list)()
    except Exception as error:  # noqa: BLE001  (whatever a broken package raises is the finding)
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    return {"version": str(getattr(module, "__version__", "")), "providers": providers}


def _gpu(driver: ctypes.CDLL, number: int) -> dict[str, Any]:
    device, name, memory = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_size_t()
    driver.cuDeviceGet(ctypes.byref(device), number)
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)

    def attribute(which: int) -> int:
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), which, device)
        return value.value

    return {
        "name": name.value.decode(errors="replace"),
        "compute_capability": f"{attribute(MAJOR)}.{attribute(MINOR)}",
        "memory": memory.value,
        "integrated": bool(attribute(INTEGRATED)),
    }


if __name__ == "__main__":
    asked, path = sys.argv[1:]
    sys.path[:] = json.loads(path)
    print(json.dumps(cuda() if asked == "cuda" else package(asked)))
