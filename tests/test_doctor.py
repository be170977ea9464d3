from __future__ import annotations

import json
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest

from ddpm_deploy import doctor
from ddpm_deploy.errors import DDPMDeployError


def finding(what: str) -> doctor.Finding:
    return next(f for f in doctor.findings() if f.what == what)


def test_the_machine_is_plain_json() -> None:
    machine = doctor.machine()
    assert json.loads(json.dumps(machine)) == machine
    assert machine["cores"] >= 1
    assert machine["memory"] > 2**20
    assert machine["free_disk"] > 0


def test_every_package_that_is_there_has_a_version() -> None:
    for found in doctor.findings():
        assert found.detail
        assert bool(found.fix) is not found.ok
    assert finding("onnxruntime CPU").ok
    assert finding("numpy").ok


def test_a_missing_package_says_what_it_is_for_and_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    torch, ort = finding("torch"), finding("onnxruntime CPU")
    assert (torch.ok, torch.fix) == (False, "pip install 'ddpm-deploy[export]'")
    assert torch.detail == "not installed; for export, verify against a checkpoint"
    assert not ort.ok
    assert "ddpm-deploy[cpu]" in ort.fix
    assert not doctor.can_run(doctor.findings())


def test_one_runtime_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert doctor.can_run(doctor.findings())
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "torch", None)
    assert doctor.can_run(doctor.findings())


def test_a_runtime_that_is_there_but_broken_is_no_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
            return ModuleSpec(name, self) if name == "onnxruntime" else None  # type: ignore[arg-type]

        def create_module(self, _: ModuleSpec) -> None:
            return None

        def exec_module(self, _: ModuleType) -> None:
            raise ImportError("libonnxruntime.so.1: cannot open shared object file")

    monkeypatch.delitem(sys.modules, "onnxruntime")
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    ort = finding("onnxruntime CPU")
    assert not ort.ok
    assert "cannot be imported: libonnxruntime.so.1: cannot open" in ort.detail
    assert "--force-reinstall" in ort.fix


def test_cuda_counts_only_where_its_driver_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)

    def fail() -> None:
        raise DDPMDeployError("no NVIDIA driver", hint="Install the driver.")

    monkeypatch.setattr(doctor, "_start_cuda", fail)
    cuda = finding("onnxruntime CUDA")
    assert (cuda.ok, cuda.detail, cuda.fix) == (False, "no NVIDIA driver", "Install the driver.")
    monkeypatch.setattr(doctor, "_start_cuda", lambda: None)
    assert finding("onnxruntime CUDA").ok
