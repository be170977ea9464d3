"""What is wrong with a machine, each with the line that mends it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from ddpm_deploy.doctor.system import Distribution, System

PYTHON = (3, 10)
XAVIER = "7.2"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that is wrong.

    Attributes:
        what: What it is, with its values.
        fix: One line that mends it.
        is_command: Whether that line can be typed; it is a sentence otherwise.
    """

    what: str
    fix: str
    is_command: bool = True


def findings(system: System) -> Iterator[Finding]:
    """Yields what is wrong."""
    if _numbers(system.python)[:2] < PYTHON:
        yield Finding(
            what=f"Python {system.python} is too old; ddpm-deploy needs 3.10 or later.",
            fix="Install Python 3.10 or later; JetPack 6 has 3.10, and JetPack 7 has 3.12.",
            is_command=False,
        )
    yield from _onnxruntime_findings(system)
    yield from tensorrt_findings(system)
    yield from _import_findings(system, "tensorrt_rtx", "rtx")
    yield from _driver_findings(system)


def _onnxruntime_findings(system: System) -> Iterator[Finding]:
    wheels = [each.name for each in system.all_of("onnxruntime")]
    gpu = bool(system.cuda.gpus) and system.jetson is None
    if len(wheels) > 1:
        yield Finding(
            what=f"{' and '.join(wheels)} are both installed; they share the module onnxruntime, "
            "so each has overwritten files of the other.",
            fix=f"pip uninstall -y {' '.join(wheels)} && "
            f"pip install 'ddpm-deploy[{'gpu' if gpu else 'cpu'}]'",
        )
        return
    yield from _import_findings(system, "onnxruntime", "gpu" if gpu else "cpu")
    without = "pip uninstall -y onnxruntime-gpu && pip install 'ddpm-deploy[cpu]'"
    if is_foreign_onnxruntime(system):
        yield Finding(
            what="This onnxruntime-gpu is PyPI's, which holds no code for the GPU of a Jetson Orin "
            "or Thor; TensorRT plans run there.",
            fix=without,
        )
    elif has_cuda_provider(system) and not system.cuda.gpus:
        yield Finding(
            what="onnxruntime-gpu is installed, and CUDA does not start: "
            f"{system.cuda.error or 'it finds no GPU'}.",
            fix=without if not system.driver else _driver_fix(system),
            is_command=not system.driver,
        )


def tensorrt_findings(system: System) -> Iterator[Finding]:
    """Yields what is wrong with TensorRT."""
    found, imported = system.find("tensorrt"), system.imports.get("tensorrt")
    if found is None:
        if imported is None:
            yield from _hidden_tensorrt(system)
        else:
            yield from _import_findings(system, "tensorrt", "tensorrt")
        return
    numbers, jetson = _numbers(found.version), system.jetson
    if numbers < (10,):
        yield _old_tensorrt(system, found)
    elif numbers >= (11,) and jetson and not (numbers >= (11, 4, 1) and jetson.takes_tensorrt_11):
        names = [
            name
            for name, each in system.distributions.items()
            if name.startswith("tensorrt") and "rtx" not in name and each.version.startswith("11")
        ]
        yield Finding(
            what=f"TensorRT {found.version} does not support JetPack {jetson.jetpack}: TensorRT 11 "
            "supports a Jetson from 11.4.1 on, with JetPack 7.2.2, on AGX Orin and Thor. JetPack "
            "brings TensorRT 10.",
            fix=f"pip uninstall -y {' '.join(sorted(names))}"
            if not found.is_of_the_system
            else "Remove its packages, and take JetPack's own: sudo apt install nvidia-jetpack",
            is_command=not found.is_of_the_system,
        )
    else:
        yield from _import_findings(system, "tensorrt", "tensorrt")


def _hidden_tensorrt(system: System) -> Iterator[Finding]:
    hidden = system.system_tensorrt()
    if hidden is None:
        return
    lies = f"TensorRT {hidden.version} lies in {hidden.folder}"
    python = hidden.folder.removeprefix("/usr/lib/python").split("/")[0]
    if python not in {"3", ".".join(system.python.split(".")[:2])}:
        yield Finding(
            what=f"{lies}; it is for Python {python}, and this is Python {system.python}.",
            fix=f"/usr/bin/python{python} -m venv --system-site-packages venv",
        )
    else:
        why = "this virtual environment hides it" if system.is_isolated else "not on Python's path"
        # Over an environment that is there, venv changes its settings and keeps its packages.
        yield Finding(
            what=f"{lies}; {why}.",
            fix=f"/usr/bin/python3 -m venv --system-site-packages "
            f"{system.prefix if system.is_isolated else 'venv'}",
        )


def _old_tensorrt(system: System, found: Distribution) -> Finding:
    jetson = system.jetson
    what = f"TensorRT {found.version} is too old; plans need TensorRT 10."
    if jetson is None:
        return Finding(what=what, fix="pip install --upgrade 'ddpm-deploy[tensorrt]' tensorrt")
    if any(gpu.compute_capability == XAVIER for gpu in system.cuda.gpus):
        return Finding(
            what=f"{what} JetPack 5 has none later and is a Xavier's last: ONNX Runtime on the CPU "
            "is what runs here.",
            fix="pip install 'ddpm-deploy[cpu]'",
        )
    return Finding(
        what=f"{what} It comes with JetPack {jetson.jetpack}.",
        fix="Move this board to JetPack 6.2 or later, which has TensorRT 10.3.",
        is_command=False,
    )


def _import_findings(system: System, module: str, extra: str) -> Iterator[Finding]:
    imported, found = system.imports.get(module), system.find(module)
    if imported is None or not imported.error:
        return
    version = f" {found.version}" if found else ""
    fix = f"pip install --force-reinstall 'ddpm-deploy[{extra}]'"
    if found and found.is_of_the_system:
        fix = "sudo apt install nvidia-jetpack" if system.jetson else "sudo apt install tensorrt"
    yield Finding(
        what=f"{module}{version} is installed, but cannot be imported: {imported.error}", fix=fix
    )


def _driver_findings(system: System) -> Iterator[Finding]:
    if system.driver and not system.cuda.gpus and not has_cuda_provider(system):
        yield Finding(
            what=f"The NVIDIA driver {system.driver} is loaded, and CUDA does not start: "
            f"{system.cuda.error or 'it finds no GPU'}.",
            fix=_driver_fix(system),
            is_command=False,
        )


def _driver_fix(system: System) -> str:
    if "libcuda" in system.cuda.error:
        return "In a container, start it with --gpus all; elsewhere, reinstall the driver."
    return "Restart the machine, then look at: nvidia-smi"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:3]))


def has_cuda_provider(system: System) -> bool:
    """Tells whether ONNX Runtime was built with CUDA."""
    imported = system.imports.get("onnxruntime")
    return imported is not None and "CUDAExecutionProvider" in imported.providers


def is_foreign_onnxruntime(system: System) -> bool:
    """Tells whether a Jetson has PyPI's onnxruntime-gpu; only that is a manylinux wheel.

    Its kernels are for compute capabilities 8.9, 9.0, 12.0 and 12.1; Orin is 8.7 and Thor 11.0.
    """
    found = system.distributions.get("onnxruntime-gpu")
    return bool(system.jetson and found and "manylinux" in found.wheel)
