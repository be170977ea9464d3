from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest

from ddpm_deploy.doctor import examine, machine, read_system, system
from ddpm_deploy.doctor.jetson import read_jetson
from ddpm_deploy.doctor.system import Cuda, Gpu
from tests.machines import install, nothing, orin, write


def test_this_machine_is_plain_json() -> None:
    here = machine()
    assert json.loads(json.dumps(here)) == here
    assert here["cores"] == os.cpu_count()
    assert here["memory"] == pytest.approx(
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), rel=0.01
    )
    assert here["free_disk"] > 0


CPUINFO = """processor\t: {0}
model name\t: Some CPU @ 2.60GHz
physical id\t: 0
core id\t\t: {1}
"""


def test_a_core_of_two_threads_is_one_core(tmp_path: Path) -> None:
    write(tmp_path, "/proc/cpuinfo", "\n".join(CPUINFO.format(i, i % 4) for i in range(8)))
    here = replace(nothing(tmp_path), root=tmp_path)
    assert here.cpu == "Some CPU @ 2.60GHz"
    assert here.physical_cores(range(8)) == 4
    assert here.physical_cores([0, 1, 5]) == 2  # 1 and 5 are one core


def test_where_cpuinfo_names_no_cores_each_processor_is_one(tmp_path: Path) -> None:
    here = replace(nothing(tmp_path), root=tmp_path)
    assert (here.cpu, here.physical_cores(range(6))) == ("", 6)
    write(tmp_path, "/proc/cpuinfo", "processor\t: 0\n\nprocessor\t: 1\n\nModel\t: a board\n")
    assert (here.cpu, here.physical_cores(range(2))) == ("", 2)


def test_this_machines_packages_are_those_of_its_metadata() -> None:
    import onnxruntime

    here = read_system(runtimes=["onnxruntime"])
    assert here.imports["onnxruntime"].version == onnxruntime.__version__
    assert list(here.imports["onnxruntime"].providers) == onnxruntime.get_available_providers()
    for package in examine(here).packages:
        if package.version:
            assert package.version == metadata.version(package.name)
    numpy = next(p for p in examine(here).packages if p.name == "numpy")
    assert numpy.version == metadata.version("numpy")


DRIVER = """
#include <string.h>
#include <stddef.h>
int cuInit(unsigned flags) { return INIT; }
int cuGetErrorName(int error, const char **name) { *name = "CUDA_ERROR_NO_DEVICE"; return 0; }
int cuDriverGetVersion(int *version) { *version = 12060; return 0; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGet(int *device, int number) { *device = 40 + number; return 0; }
int cuDeviceGetName(char *name, int size, int device) { strncpy(name, "Orin", size); return 0; }
int cuDeviceTotalMem_v2(size_t *size, int device) { *size = 7990464512; return 0; }
int cuDeviceGetAttribute(int *value, int which, int device) {
    *value = which == 75 ? 8 : which == 76 ? 7 : which == 18 ? device == 41 : -1;
    return 0;
}
"""


@pytest.mark.parametrize("init", [0, 100])
def test_the_cuda_driver_names_its_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, init: int
) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler to make a driver with")
    source = tmp_path / "driver.c"
    source.write_text(DRIVER, encoding="utf-8")
    library = tmp_path / "libcuda.so.1"
    subprocess.run(
        [compiler, "-shared", "-fPIC", f"-DINIT={init}", source, "-o", library], check=True
    )
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    cuda = read_system(runtimes=()).cuda
    if init:
        assert cuda == Cuda(error="cuInit gives CUDA_ERROR_NO_DEVICE (100)")
    else:
        first = Gpu(name="Orin", compute_capability="8.7", memory=7_990_464_512, integrated=False)
        assert cuda == Cuda(version="12.6", gpus=(first, replace(first, integrated=True)))


@pytest.mark.gpu
def test_the_gpu_is_the_one_that_nvidia_smi_names() -> None:
    smi = shutil.which("nvidia-smi")
    if smi is None:
        pytest.skip("there is no nvidia-smi")
    query = "--query-gpu=name,compute_cap,driver_version"
    asked = subprocess.run(
        [smi, query, "--format=csv,noheader"], capture_output=True, text=True, check=True
    )
    name, capability, driver = asked.stdout.splitlines()[0].split(", ")
    here = read_system(runtimes=())
    assert here.cuda.gpus[0].name == name
    assert here.cuda.gpus[0].compute_capability == capability
    assert here.driver in {driver, ""}  # WSL has no /proc/driver/nvidia


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crashes with SIGSEGV"),
        ("raise ImportError('libnvinfer.so.10: cannot open\\nfile')", "libnvinfer.so.10: cannot"),
        ("raise AttributeError('np.bool')", "AttributeError: np.bool"),
        ("import os; os._exit(3)", "ends its process with code 3"),
        ("import time; time.sleep(60)", "did not answer within 1 s"),
        ("print('a banner'); __version__ = '10.3.0'", ""),
    ],
)
def test_a_runtime_that_is_broken_breaks_no_more_than_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, error: str
) -> None:
    (tmp_path / "tensorrt.py").write_text(code, encoding="utf-8")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(system, "PATIENCE", 1 if "sleep" in code else 60)
    here = read_system(runtimes=["tensorrt"])
    assert error in here.imports["tensorrt"].error
    assert here.runs("tensorrt") == ("" if error else "10.3.0")
    assert bool(error) is any("tensorrt" in found.what for found in examine(here).findings)


def test_a_runtime_that_is_not_installed_is_not_imported() -> None:
    assert "no_such_runtime" not in read_system(runtimes=["no_such_runtime"]).imports


def test_of_two_tensorrts_the_one_that_python_finds_counts(tmp_path: Path) -> None:
    here = orin(tmp_path)
    install(tmp_path, "/home/me/venv/lib/python3.10/site-packages", "tensorrt_cu12 10.7.0")
    found = here.find("tensorrt")
    assert found is not None
    assert (found.name, found.version) == ("tensorrt-cu12", "10.7.0")


def test_a_folder_that_a_removal_left_behind_is_no_package(tmp_path: Path) -> None:
    here = nothing(tmp_path)
    write(tmp_path, "/home/me/venv/lib/python3.12/site-packages/torch-2.0.dist-info/RECORD", "")
    assert "torch" not in here.distributions


def test_a_machine_without_its_files_is_of_unknown_memory(tmp_path: Path) -> None:
    here = nothing(tmp_path)
    (tmp_path / "proc/meminfo").unlink()
    assert (here.memory(), here.driver, here.jetson) == (None, "", None)


@pytest.mark.parametrize(
    ("release", "revision", "jetpack"),
    [  # NVIDIA's JetPack archive
        (35, "6.1", "5.1.5"),
        (36, "3.0", "6.0"),
        (36, "4.4", "6.2.1"),
        (38, "4.0", "7.1"),
        (39, "2.0", "7.2"),
        (39, "9.1", "7"),
        (55, "0.0", "unknown"),
    ],
)
def test_jetson_linux_tells_the_jetpack(release: int, revision: str, jetpack: str) -> None:
    text = f"# R{release} (release), REVISION: {revision}, GCID: 1, BOARD: generic, EABI: aarch64"
    board = read_jetson(text, "NVIDIA Jetson AGX Thor Developer Kit\0")
    assert board is not None
    assert (board.l4t, board.jetpack) == (f"{release}.{revision}", jetpack)
    assert board.model == "NVIDIA Jetson AGX Thor Developer Kit"


@pytest.mark.parametrize("text", ["", "no such thing", "# R36 (release)"])
def test_another_file_tells_no_jetson(text: str) -> None:
    assert read_jetson(text, "") is None


def test_making_a_virtual_environment_again_opens_it_and_keeps_its_packages(tmp_path: Path) -> None:
    folder = tmp_path / "venv"
    venv.create(folder, with_pip=False)
    here = nothing(tmp_path)
    isolated = replace(here, root=Path("/"), prefix=str(folder))
    before = isolated.is_isolated
    (folder / "kept").write_text("", encoding="utf-8")
    venv.create(folder, with_pip=False, system_site_packages=True)  # what the fix does
    assert (before, isolated.is_isolated) == (True, False)
    assert (folder / "kept").exists()
