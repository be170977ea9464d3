"""Machines for the doctor's tests: small file systems with the files that such machines have.

`python -m tests.machines` writes tests/data/machines anew. Read what it wrote before you commit it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

from ddpm_deploy import __version__
from ddpm_deploy.doctor.system import Cuda, Gpu, Imported, System
from tests.commands import run

GOLDEN = Path(__file__).parent / "data" / "machines"
GIB = 2**30

ORIN = Gpu(name="Orin", compute_capability="8.7", memory=7_990_464_512, integrated=True)
THOR = Gpu(name="NVIDIA Thor", compute_capability="11.0", memory=131_882_668_032, integrated=True)
XAVIER = Gpu(name="Xavier", compute_capability="7.2", memory=33_457_557_504, integrated=True)
RTX_4090 = Gpu(
    name="NVIDIA GeForce RTX 4090",
    compute_capability="8.9",
    memory=25_282_281_472,
    integrated=False,
)
H100 = Gpu(
    name="NVIDIA H100 80GB HBM3",
    compute_capability="9.0",
    memory=84_929_347_584,
    integrated=False,
)

CPU = ("AzureExecutionProvider", "CPUExecutionProvider")
GPU = ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider")
NO_DRIVER = "there is no NVIDIA driver (libcuda.so.1 is missing)"


def write(root: Path, path: str, text: str) -> None:
    """Writes a file of the machine whose `/` is at `root`."""
    file = root / path.lstrip("/")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def install(root: Path, folder: str, *packages: str, wheel: str = "") -> None:
    """Installs packages, `numpy 1.26.4`, as far as their metadata goes."""
    for package in packages:
        name, version = package.split()
        info = f"{folder}/{name.replace('-', '_')}-{version}.dist-info"
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        write(root, f"{info}/METADATA", text)
        if wheel:
            write(root, f"{info}/WHEEL", f"Wheel-Version: 1.0\nTag: {wheel}\n")


def meminfo(root: Path, total: int, available: int) -> None:
    lines = f"MemTotal: {total:>14} kB\nMemFree: {available // 2:>15} kB\n"
    write(root, "/proc/meminfo", f"{lines}MemAvailable: {available:>10} kB\nSwapTotal: 0 kB\n")


def driver(root: Path, module: str, version: str) -> None:
    text = f"NVRM version: NVIDIA UNIX {module}  {version}  Release Build  (builder)\n"
    write(root, "/proc/driver/nvidia/version", f"{text}GCC version:  gcc version 12.3.0\n")


def jetson(root: Path, release: int, revision: str, model: str, driver_version: str = "") -> None:
    line = f"# R{release} (release), REVISION: {revision}, GCID: 0, BOARD: generic, EABI: aarch64"
    write(root, "/etc/nv_tegra_release", f"{line}\n# KERNEL_VARIANT: oot\n")
    write(root, "/proc/device-tree/model", f"{model}\0")
    if driver_version:
        driver(root, "Open Kernel Module for aarch64", driver_version)


def virtual_environment(root: Path, *, sees_the_system: bool) -> None:
    flag = "true" if sees_the_system else "false"
    text = f"home = /usr/bin\ninclude-system-site-packages = {flag}\n"
    write(root, "/home/me/venv/pyvenv.cfg", text)


def orin(root: Path, *, sees_the_system: bool = True, tensorrt: str = "10.3.0") -> System:
    """A Jetson Orin Nano with JetPack 6.2 and ddpm-deploy in a virtual environment."""
    model = "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"
    jetson(root, 36, "4.3", model, "540.4.0")
    meminfo(root, 7_802_632, 5_300_000)
    virtual_environment(root, sees_the_system=sees_the_system)
    site = "/home/me/venv/lib/python3.10/site-packages"
    install(root, site, "numpy 1.26.4", "onnxruntime 1.20.1")
    install(root, site, "polygraphy 0.49.24", "cuda-bindings 12.9.4")
    install(root, "/usr/lib/python3.10/dist-packages", f"tensorrt {tensorrt}")
    system = ("/usr/local/lib/python3.10/dist-packages", "/usr/lib/python3/dist-packages")
    imports = {"onnxruntime": Imported(version="1.20.1", providers=CPU)}
    if sees_the_system:
        imports["tensorrt"] = Imported(version=tensorrt)
    return System(
        root=root,
        python="3.10.12",
        platform="Linux-5.15.148-tegra-aarch64-with-glibc2.35",
        processor="aarch64",
        cores=6,
        free_disk=101 * GIB,
        prefix="/home/me/venv",
        path=(
            "",
            "/usr/lib/python310.zip",
            "/usr/lib/python3.10",
            site,
            *((*system, "/usr/lib/python3.10/dist-packages") if sees_the_system else ()),
        ),
        cuda=Cuda(version="12.6", gpus=(ORIN,)),
        imports=imports,
    )


def thor(root: Path, *, revision: str = "2.0") -> System:
    """A Jetson AGX Thor with JetPack 7.2."""
    jetson(root, 39, revision, "NVIDIA Jetson AGX Thor Developer Kit", "595.58.03")
    meminfo(root, 128_791_668, 120_000_000)
    virtual_environment(root, sees_the_system=True)
    site = "/home/me/venv/lib/python3.12/site-packages"
    install(root, site, "numpy 2.3.4", "onnxruntime 1.32.0")
    install(root, site, "polygraphy 0.53.6", "cuda-bindings 13.2.0")
    install(root, "/usr/lib/python3.12/dist-packages", "tensorrt 10.16.2.10")
    return System(
        root=root,
        python="3.12.3",
        platform="Linux-6.8.12-tegra-aarch64-with-glibc2.39",
        processor="aarch64",
        cores=14,
        free_disk=801 * GIB,
        prefix="/home/me/venv",
        path=(site, "/usr/lib/python3/dist-packages", "/usr/lib/python3.12/dist-packages"),
        cuda=Cuda(version="13.2", gpus=(THOR,)),
        imports={
            "onnxruntime": Imported(version="1.32.0", providers=CPU),
            "tensorrt": Imported(version="10.16.2.10"),
        },
    )


SITE = "/home/me/venv/lib/python3.12/site-packages"


def desktop(root: Path, *packages: str, imports: dict[str, Imported], cuda: Cuda) -> System:
    """A PC with Ubuntu and what is named."""
    meminfo(root, 65_680_000, 60_000_000)
    virtual_environment(root, sees_the_system=False)
    install(root, SITE, "numpy 2.4.6", *packages)
    if cuda.version:
        driver(root, "x86_64 Kernel Module", "580.95.05")
    return System(
        root=root,
        python="3.12.3",
        platform="Linux-6.8.0-86-generic-x86_64-with-glibc2.39",
        processor="x86_64",
        cores=16,
        free_disk=400 * GIB,
        prefix="/home/me/venv",
        path=("", SITE),
        cuda=cuda,
        imports=imports,
    )


ONNXRUNTIME = Imported(version="1.32.0", providers=CPU)
ONNXRUNTIME_GPU = Imported(version="1.31.1", providers=GPU)
NO_CUDA = Cuda(error=NO_DRIVER)
PLANS = ("polygraphy 0.53.6", "cuda-bindings 13.2.0")
EXPORT = ("torch 2.13.0", "onnx 1.23.2", "onnxscript 0.7.2", "safetensors 0.8.0")


def tensorrt_wheels(version: str, cuda: int) -> tuple[str, ...]:
    """The packages that `pip install tensorrt` brings."""
    parts = ("", "-libs", "-bindings")
    return f"tensorrt {version}", *(f"tensorrt-cu{cuda}{part} {version}" for part in parts)


def desktop_tensorrt_10(root: Path) -> System:
    return desktop(
        root,
        *("onnxruntime-gpu 1.31.1", *PLANS, *EXPORT, *tensorrt_wheels("10.13.3.9", 12)),
        imports={
            "onnxruntime": ONNXRUNTIME_GPU,
            "tensorrt": Imported(version="10.13.3.9"),
        },
        cuda=Cuda(version="13.0", gpus=(RTX_4090,)),
    )


def server_tensorrt_11(root: Path) -> System:
    """An H100 with both flavours."""
    return desktop(
        root,
        *("onnxruntime 1.32.0", *PLANS, *EXPORT, "lightning-fabric 2.6.6", "tensorboard 2.21.0"),
        *tensorrt_wheels("11.4.0.106", 13),
        "tensorrt-rtx-cu13 1.7.1.116",
        imports={
            "onnxruntime": ONNXRUNTIME,
            "tensorrt": Imported(version="11.4.0.106"),
            "tensorrt_rtx": Imported(version="1.7.1.116"),
        },
        cuda=Cuda(version="13.0", gpus=(H100,)),
    )


def server_rtx(root: Path) -> System:
    """An H100 with TensorRT-RTX alone, which builds there and does not run."""
    return desktop(
        root,
        *("onnxruntime 1.32.0", *PLANS, "tensorrt-rtx-cu13 1.7.1.116"),
        imports={"onnxruntime": ONNXRUNTIME, "tensorrt_rtx": Imported(version="1.7.1.116")},
        cuda=Cuda(version="13.0", gpus=(H100,)),
    )


def nothing(root: Path) -> System:
    return desktop(root, imports={}, cuda=NO_CUDA)


def rtx_without_gpu(root: Path) -> System:
    return desktop(
        root,
        *("onnxruntime 1.32.0", *PLANS, "tensorrt-rtx-cu13 1.7.1.116"),
        imports={"onnxruntime": ONNXRUNTIME, "tensorrt_rtx": Imported(version="1.7.1.116")},
        cuda=NO_CUDA,
    )


def gpu_and_no_runtime(root: Path) -> System:
    return desktop(root, imports={}, cuda=Cuda(version="13.0", gpus=(RTX_4090,)))


def orin_hidden_tensorrt(root: Path) -> System:
    return orin(root, sees_the_system=False)


def orin_tensorrt_11(root: Path) -> System:
    """What `pip install tensorrt` does on a Jetson."""
    system = orin(root)
    site = "/home/me/venv/lib/python3.10/site-packages"
    install(root, site, *tensorrt_wheels("11.4.0.106", 13))
    imports = {**system.imports, "tensorrt": Imported(error="ImportError: libcudart.so.13: ...")}
    return replace(system, imports=imports)


def orin_jetpack_6_0(root: Path) -> System:
    system = orin(root, tensorrt="8.6.2")
    jetson(root, 36, "3.0", "NVIDIA Jetson AGX Orin Developer Kit", "540.3.0")
    meminfo(root, 64_335_836, 60_000_000)
    gpu = replace(ORIN, memory=64_335_836 * 1024)
    return replace(system, cuda=Cuda(version="12.2", gpus=(gpu,)), cores=12)


def xavier_jetpack_5(root: Path) -> System:
    """A Python of its own, since JetPack 5 has 3.8."""
    jetson(root, 35, "6.1", "Jetson-AGX")
    meminfo(root, 32_673_396, 30_000_000)
    install(root, "/opt/python3.10/lib/python3.10/site-packages", "numpy 1.26.4")
    install(root, "/usr/lib/python3.8/dist-packages", "tensorrt 8.5.2.2")
    return System(
        root=root,
        python="3.8.10",
        platform="Linux-5.10.216-tegra-aarch64-with-glibc2.29",
        processor="aarch64",
        cores=8,
        free_disk=20 * GIB,
        prefix="/usr",
        path=("/usr/lib/python3.8/dist-packages",),
        cuda=Cuda(version="11.4", gpus=(XAVIER,)),
        imports={"tensorrt": Imported(version="8.5.2.2")},
    )


def thor_pypi_onnxruntime_gpu(root: Path) -> System:
    system = thor(root)
    site = "/home/me/venv/lib/python3.12/site-packages"
    (root / site.lstrip("/") / "onnxruntime-1.32.0.dist-info/METADATA").unlink()
    (root / site.lstrip("/") / "onnxruntime-1.32.0.dist-info").rmdir()
    tag = "cp312-cp312-manylinux_2_34_aarch64"
    install(root, site, "onnxruntime-gpu 1.31.1", wheel=tag)
    runtime = Imported(version="1.31.1", providers=GPU[1:])
    return replace(system, imports={**system.imports, "onnxruntime": runtime})


def two_onnxruntimes(root: Path) -> System:
    return desktop(
        root,
        *("onnxruntime 1.32.0", "onnxruntime-gpu 1.31.1"),
        imports={"onnxruntime": ONNXRUNTIME_GPU},
        cuda=Cuda(version="13.0", gpus=(RTX_4090,)),
    )


def gpu_wheel_without_driver(root: Path) -> System:
    return desktop(
        root,
        "onnxruntime-gpu 1.31.1",
        imports={"onnxruntime": ONNXRUNTIME_GPU},
        cuda=NO_CUDA,
    )


def container_without_gpu(root: Path) -> System:
    """The host's driver is seen in /proc, and its libraries are not there."""
    system = desktop(root, "onnxruntime 1.32.0", imports={"onnxruntime": ONNXRUNTIME}, cuda=NO_CUDA)
    driver(root, "Open Kernel Module for x86_64", "580.95.05")
    return system


def bindings_without_libnvinfer(root: Path) -> System:
    error = "ImportError: libnvinfer.so.11: cannot open shared object file: No such file"
    return desktop(
        root,
        *("onnxruntime 1.32.0", *PLANS, "tensorrt-cu13-bindings 11.4.0.106"),
        imports={"onnxruntime": ONNXRUNTIME, "tensorrt": Imported(error=error)},
        cuda=Cuda(version="13.0", gpus=(RTX_4090,)),
    )


MACHINES: dict[str, Callable[[Path], System]] = {
    "orin-jetpack-6.2": orin,
    "thor-jetpack-7.2": thor,
    **{
        make.__name__.replace("_", "-"): make
        for make in (
            desktop_tensorrt_10,
            server_tensorrt_11,
            server_rtx,
            nothing,
            rtx_without_gpu,
            gpu_and_no_runtime,
            orin_hidden_tensorrt,
            orin_tensorrt_11,
            orin_jetpack_6_0,
            xavier_jetpack_5,
            thor_pypi_onnxruntime_gpu,
            two_onnxruntimes,
            gpu_wheel_without_driver,
            container_without_gpu,
            bindings_without_libnvinfer,
        )
    },
}


def visit(system: System) -> tuple[str, str]:
    """Runs `doctor` on a machine; gives its text, with the exit code, and its JSON."""
    with (
        mock.patch("ddpm_deploy.doctor.read_system", return_value=system),
        mock.patch.dict("os.environ", {"COLUMNS": "80"}),
    ):
        text, report = run("doctor"), run("doctor", "--json")
    assert text.err == report.err == ""
    assert text.code == report.code
    return f"{_plain(text.out)}exit {text.code}\n", _plain(report.out)


def _plain(text: str) -> str:
    return text.replace(__version__, "VERSION", 1)


def _write_all() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for name, make in MACHINES.items():
        with tempfile.TemporaryDirectory() as folder:
            text, report = visit(make(Path(folder)))
        json.loads(report)
        (GOLDEN / f"{name}.txt").write_text(text, encoding="utf-8")
        (GOLDEN / f"{name}.json").write_text(report, encoding="utf-8")


if __name__ == "__main__":
    _write_all()
