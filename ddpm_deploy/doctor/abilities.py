"""What the commands can do on a machine, and what to install for those that cannot."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ddpm_deploy.capability import rtx_runs_on
from ddpm_deploy.doctor.findings import (
    has_cuda_provider,
    is_foreign_onnxruntime,
    tensorrt_findings,
)
from ddpm_deploy.doctor.system import System

PLAN_PACKAGES = ("polygraphy", "cuda-bindings")
EXPORT_PACKAGES = ("torch", "onnx", "onnxscript", "safetensors")
TRAIN_PACKAGES = ("torch", "lightning-fabric", "tensorboard")
JETPACK_TENSORRT = "sudo apt install nvidia-jetpack && pip install 'ddpm-deploy[jetson]'"


@dataclass(frozen=True, kw_only=True)
class Ability:
    """What a command can do here.

    Attributes:
        command: The command, in the words that are typed.
        ok: Whether it works.
        detail: With what, or for want of what it does not.
        fix: What to type to get it; empty where it works.
    """

    command: str
    ok: bool
    detail: str
    fix: str = ""


def abilities(system: System) -> Iterator[Ability]:
    """Yields what each command can do."""
    onnxruntime = system.runs("onnxruntime")
    yield _export(system, onnxruntime)
    yield _onnx(system, "build", "float32, for ONNX Runtime", onnxruntime)
    yield _openvino(system)
    yield _build_plan(system)
    yield _sample_graph(system, onnxruntime)
    yield _sample_plan(system)
    yield _needing(system, "sample -e model.pt", ("torch",), "export")
    yield _needing(system, "train", TRAIN_PACKAGES, "train")


def _export(system: System, onnxruntime: str) -> Ability:
    if onnxruntime:
        return _needing(system, "export", EXPORT_PACKAGES, "export")
    # The graph is checked in ONNX Runtime; a second wheel of it would break the first.
    extra = f"export,{_onnxruntime_extra(system)}"
    return _needing(system, "export", (*EXPORT_PACKAGES, "onnxruntime"), extra)


def _onnxruntime_extra(system: System) -> str:
    return "gpu" if system.cuda.gpus and system.jetson is None else "cpu"


def _needing(system: System, command: str, names: tuple[str, ...], extra: str) -> Ability:
    missing = [name for name in names if name not in system.distributions]
    if missing:
        return Ability(
            command=command,
            ok=False,
            detail="needs " + ", ".join(missing),
            fix=f"pip install 'ddpm-deploy[{extra}]'",
        )
    torch = system.distributions.get("torch")
    return Ability(command=command, ok=True, detail=f"torch {torch.version}" if torch else "")


def _onnx(system: System, command: str, what: str, version: str) -> Ability:
    if not version:
        return Ability(
            command=command,
            ok=False,
            detail="needs onnxruntime",
            fix=f"pip install 'ddpm-deploy[{_onnxruntime_extra(system)}]'",
        )
    where = "the CPU"
    if has_cuda_provider(system) and system.cuda.gpus and not is_foreign_onnxruntime(system):
        where = f"{system.cuda.gpus[0].name} through CUDA, or the CPU"
    return Ability(command=command, ok=True, detail=f"{what} {version}, on {where}")


def _openvino(system: System) -> Ability:
    command, version = "build --runtime openvino", _openvino_version(system)
    missing = [] if version else ["openvino"]
    missing += [] if "onnx" in system.distributions else ["onnx"]
    if missing:
        return Ability(
            command=command,
            ok=False,
            detail="needs " + " and ".join(missing),
            fix="pip install 'ddpm-deploy[openvino]'",
        )
    detail = f"OpenVINO {version}, on the CPU: float32, int8; bfloat16 where it has that"
    return Ability(command=command, ok=True, detail=detail)


def _openvino_version(system: System) -> str:
    return system.runs("openvino").split("-")[0]  # it names its commit, too


def _sample_graph(system: System, onnxruntime: str) -> Ability:
    command, version = "sample -e unet.onnx", _openvino_version(system)
    if version and not onnxruntime:
        return Ability(command=command, ok=True, detail=f"OpenVINO {version}, on the CPU")
    return _onnx(system, command, "ONNX Runtime", onnxruntime)


def _build_plan(system: System) -> Ability:
    plans = [*_tensorrt_plans(system), *_rtx_plans(system)]
    if plans and "polygraphy" in system.distributions:
        return Ability(command="build --fp16", ok=True, detail="; ".join(plans))
    return Ability(
        command="build --fp16",
        ok=False,
        detail="needs polygraphy" if plans else _no_plan(system),
        fix="pip install polygraphy" if plans else _plan_fix(system),
    )


def _sample_plan(system: System) -> Ability:
    plans = _tensorrt_plans(system)
    if system.cuda.gpus and _rtx_runs_here(system):
        plans += _rtx_plans(system)
    if plans and "cuda-bindings" in system.distributions:
        return Ability(command="sample -e unet.plan", ok=True, detail="; ".join(plans))
    if plans:
        detail, fix = "needs cuda-bindings", "pip install cuda-bindings"
    elif system.cuda.gpus:
        detail, fix = _no_plan(system), _plan_fix(system)
    else:
        detail, fix = "needs an NVIDIA GPU with its driver, and TensorRT", ""
    return Ability(command="sample -e unet.plan", ok=False, detail=detail, fix=fix)


def _tensorrt_plans(system: System) -> list[str]:
    version = system.runs("tensorrt")
    if not version or not system.cuda.gpus or list(tensorrt_findings(system)):
        return []
    gpu = system.cuda.gpus[0]
    return [f"TensorRT {version}, for {gpu.name} (compute capability {gpu.compute_capability})"]


def _rtx_plans(system: System) -> list[str]:
    version = system.runs("tensorrt_rtx")
    if not version or system.jetson is not None:  # NVIDIA lists no Jetson for TensorRT-RTX
        return []
    plan = f"TensorRT-RTX {version}, for GeForce and RTX GPUs"
    if not _rtx_runs_here(system):
        gpu = system.cuda.gpus[0]
        return [f"{plan} elsewhere: it runs on none of compute capability {gpu.compute_capability}"]
    return [plan if system.cuda.gpus else f"{plan} elsewhere, ahead of time"]


def _rtx_runs_here(system: System) -> bool:
    """Tells whether the GPU here, if there is one, runs TensorRT-RTX's plans."""
    return all(rtx_runs_on(gpu.compute_capability) for gpu in system.cuda.gpus[:1])


def _no_plan(system: System) -> str:
    if list(tensorrt_findings(system)):
        return "there is a TensorRT, which does not work: see below"
    version = system.runs("tensorrt")
    if version and not system.cuda.gpus:
        return f"TensorRT {version} builds only where its GPU is, and CUDA does not start"
    if system.jetson is not None:
        return "needs TensorRT, which comes with JetPack"
    if not _rtx_runs_here(system):
        gpu = system.cuda.gpus[0]
        return (
            f"needs TensorRT: TensorRT-RTX does not run on {gpu.name} (compute capability "
            f"{gpu.compute_capability})"
        )
    if system.cuda.gpus:
        return "needs TensorRT: [tensorrt], or [rtx] for a GeForce or RTX GPU"
    return (
        "needs TensorRT: [rtx] builds here, ahead of time, for GeForce and RTX GPUs; [tensorrt] "
        "builds where its GPU is; a Jetson has JetPack's"
    )


def _plan_fix(system: System) -> str:
    if list(tensorrt_findings(system)):
        return ""
    if system.jetson is not None:
        return JETPACK_TENSORRT
    extra = "tensorrt" if system.cuda.gpus else "rtx"
    return f"pip install 'ddpm-deploy[{extra}]'"
