from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ddpm_deploy.doctor import examine
from tests.machines import GOLDEN, MACHINES, ONNXRUNTIME_GPU, install, orin, thor, visit, write


@pytest.mark.parametrize("name", MACHINES)
def test_a_machine_is_told_what_it_can_do_and_what_is_wrong(name: str, tmp_path: Path) -> None:
    text, report = visit(MACHINES[name](tmp_path))
    assert text == (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")
    assert report == (GOLDEN / f"{name}.json").read_text(encoding="utf-8")
    assert all(len(line) <= 80 and line == line.rstrip() for line in text.splitlines())
    assert json.loads(report)["ok"] is text.endswith("exit 0\n")


def test_every_golden_file_has_its_machine() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == set(MACHINES)


@pytest.mark.parametrize(
    ("revision", "version", "model", "ok"),
    [
        # TensorRT's support page: from 11.4.1, JetPack 7.2.2, AGX Orin and Thor.
        ("2.1", "11.4.1.5", "NVIDIA Jetson AGX Thor Developer Kit", False),
        ("2.2", "11.4.0.106", "NVIDIA Jetson AGX Thor Developer Kit", False),
        ("2.2", "11.4.1.5", "NVIDIA Jetson AGX Thor Developer Kit", True),
        ("2.2", "11.4.1.5", "NVIDIA Jetson AGX Orin Developer Kit", True),
        ("2.2", "11.4.1.5", "NVIDIA Jetson Orin NX Engineering Reference Developer Kit", False),
    ],
)
def test_tensorrt_11_needs_a_late_jetpack_and_a_large_board(
    tmp_path: Path, revision: str, version: str, model: str, ok: bool
) -> None:
    system = thor(tmp_path, revision=revision)
    write(tmp_path, "/proc/device-tree/model", model)
    install(tmp_path, "/home/me/venv/lib/python3.12/site-packages", f"tensorrt {version}")
    found = examine(system).findings
    assert (found == ()) is ok
    if not ok:
        assert found[0].fix == "pip uninstall -y tensorrt"
        assert f"TensorRT {version} does not support JetPack 7" in found[0].what


def test_tensorrt_11_from_a_debian_package_is_no_matter_for_pip(tmp_path: Path) -> None:
    (found,) = examine(orin(tmp_path, tensorrt="11.1.0.5")).findings
    assert not found.is_command
    assert "sudo apt install nvidia-jetpack" in found.fix


def test_jetson_ai_lab_has_an_onnxruntime_gpu_that_runs_on_an_orin(tmp_path: Path) -> None:
    system = orin(tmp_path)
    folder = "/opt/packages"
    tag = "cp310-cp310-linux_aarch64"
    install(tmp_path, folder, "onnxruntime-gpu 1.23.0", wheel=tag)
    system = replace(
        system,
        path=(folder, *(p for p in system.path if "venv" not in p)),
        imports={"onnxruntime": ONNXRUNTIME_GPU, "tensorrt": system.imports["tensorrt"]},
    )
    report = examine(system)
    assert report.ok
    sample = next(each for each in report.commands if each.command == "sample -e unet.onnx")
    assert sample.detail.endswith("on Orin through CUDA, or the CPU")


def test_a_python_that_the_systems_tensorrt_is_not_for_is_told_which_one_is(tmp_path: Path) -> None:
    system = replace(orin(tmp_path, sees_the_system=False), python="3.12.3")
    (found,) = examine(system).findings
    assert "it is for Python 3.10, and this is Python 3.12.3" in found.what
    assert found.fix == "/usr/bin/python3.10 -m venv --system-site-packages venv"
