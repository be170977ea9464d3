"""A plan that does not run here is refused, each time with what is wrong and what to type."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ddpm_deploy import open_engine
from ddpm_deploy.engines import flavour, match
from ddpm_deploy.engines.flavour import installed_version
from ddpm_deploy.engines.match import Runtimes, check_device, check_runtime
from ddpm_deploy.engines.plan import read_record, sidecar
from ddpm_deploy.errors import EngineError, MissingDependencyError, PlanMismatchError
from tests.engines.plans import BYTES, record, write_plan

AGAIN = "Build it again: ddpm-deploy build unet.onnx --fp16 -o unet.plan"
ORIN = Runtimes(versions={"tensorrt": "10.3.0"}, platform="Linux aarch64")
DESKTOP = Runtimes(versions={"tensorrt_rtx": "1.7.1.116"}, platform="Linux x86_64")
RTX = record(
    flavour="tensorrt_rtx",
    version="1.7.1.116",
    platform="Linux x86_64",
    device="",
    compute_capabilities=(),
)
PLAN = Path("unet.plan")


@pytest.fixture
def no_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the import of anything that could run a plan an error of its own."""
    for name in ("tensorrt", "tensorrt_rtx", "tensorrt_bindings", "tensorrt_rtx_bindings"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("cuda", "cuda.bindings"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "ddpm_deploy.engines.trt", raising=False)
    monkeypatch.delitem(sys.modules, "ddpm_deploy.engines.trt_network", raising=False)
    monkeypatch.delitem(sys.modules, "ddpm_deploy.engines.cuda", raising=False)


def _flip(plan: Path) -> None:
    content = bytearray(plan.read_bytes())
    content[100] ^= 1
    plan.write_bytes(content)


def _swap(plan: Path) -> None:
    sidecar(write_plan(plan.with_name("other.plan"), _of(BYTES[::-1]), BYTES[::-1])).replace(
        sidecar(plan)
    )


def _of(content: bytes) -> Any:
    return record(plan_sha256=hashlib.sha256(content).hexdigest())


def _changed(**fields: Any) -> Callable[[Path], object]:
    def change(plan: Path) -> None:
        data = json.loads(sidecar(plan).read_text())
        sidecar(plan).write_text(json.dumps(data | fields))

    return change


@pytest.mark.parametrize(
    ("damage", "said", "hint"),
    [
        (_flip, r"is not the plan of unet\.plan\.json: its SHA-256 is", AGAIN),
        (_swap, r"is not the plan of unet\.plan\.json: its SHA-256 is", AGAIN),
        (lambda plan: plan.write_bytes(BYTES[:-1]), "1,049 bytes; its sidecar says 1,050", AGAIN),
        (lambda plan: sidecar(plan).unlink(), "has no sidecar", "Copy unet.plan.json along"),
        (lambda plan: sidecar(plan).write_text("{"), "is damaged", "Copy plan and sidecar again"),
        (_changed(precision="fp8"), "damaged .*precision is 'fp8'", "Copy plan and sidecar again"),
        (_changed(precision_groups={"fp16": 3}), "damaged .*are no texts", "Copy plan and sidecar"),
        (
            _changed(seconds=float("nan")),
            "damaged .*seconds is out of",
            "Copy plan and sidecar again",
        ),
        (
            _changed(seconds=float("inf")),
            "damaged .*seconds is out of",
            "Copy plan and sidecar again",
        ),
        (
            _changed(memory=10**400),
            "damaged .*memory is out of range",
            "Copy plan and sidecar again",
        ),
        (_changed(memory=-1), "damaged .*memory is out of range", "Copy plan and sidecar again"),
        (
            _changed(tool="\ud800"),
            "damaged .*surrogates not allowed",
            "Copy plan and sidecar again",
        ),
        (_changed(layers={"CONVOLUTION HALF": "3"}), "damaged .*are no num", "Copy plan and sidec"),
        (
            _changed(format=2),
            "is of format 2; this release reads formats up to 1",
            "pip install --upgrade",
        ),
        (lambda plan: plan.unlink(), "There is no file", "Build it first: ddpm-deploy build"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(
    tmp_path: Path, no_runtime: None, damage: Callable[[Path], object], said: str, hint: str
) -> None:
    plan = write_plan(tmp_path / "unet.plan")
    damage(plan)
    with pytest.raises(EngineError, match=said) as caught:
        open_engine(plan)
    assert not isinstance(caught.value, PlanMismatchError)
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("said", "here", "message"),
    [
        (record(), replace(ORIN, versions={"tensorrt": "10.16.2"}), "loads in no other version; "),
        (record(), replace(ORIN, versions={"tensorrt": "10.3"}), r"here is TensorRT 10\.3\.$"),
        (record(), replace(ORIN, platform="Linux x86_64"), "Linux aarch64; this is Linux x86_64"),
        (record(), replace(ORIN, platform="QNX aarch64"), "Linux aarch64; this is QNX aarch64"),
        (RTX, replace(DESKTOP, platform="Linux aarch64"), "Linux x86_64; this is Linux aarch64"),
        (RTX, replace(DESKTOP, versions={"tensorrt_rtx": "1.6.0.9"}), "RTX 1.7.1.116 and loads in"),
        (
            record(version="10.16.0", version_compatible=True),
            ORIN,
            r"runs in TensorRT 10\.16\.0 and later; here is TensorRT 10\.3\.0",
        ),
    ],
)
@pytest.mark.usefixtures("no_runtime")
def test_another_version_or_platform_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Any, here: Runtimes, message: str
) -> None:
    monkeypatch.setattr(match.Runtimes, "here", lambda: here)
    plan = write_plan(tmp_path / "unet.plan", said)
    with pytest.raises(PlanMismatchError, match=message) as caught:
        open_engine(plan)
    assert caught.value.hint == AGAIN


@pytest.mark.parametrize(
    ("here", "message"),
    [
        (DESKTOP, r"by TensorRT 10\.3\.0, which is not installed here; there is TensorRT-RTX 1\.7"),
        (replace(ORIN, versions={}), r"which is not installed here; there is no TensorRT\."),
    ],
)
def test_another_flavour_is_refused_with_what_to_install(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_runtime: None,
    here: Runtimes,
    message: str,
) -> None:
    monkeypatch.setattr(match.Runtimes, "here", lambda: replace(here, platform="Linux aarch64"))
    with pytest.raises(PlanMismatchError, match=message) as caught:
        open_engine(write_plan(tmp_path / "unet.plan"))
    install = "Install TensorRT 10.3.0: pip install tensorrt==10.3.0, or the JetPack that has it."
    assert caught.value.hint == f"{install} {AGAIN}"


def test_what_fits_is_not_refused() -> None:
    check_runtime(PLAN, record(), ORIN)
    check_runtime(PLAN, RTX, DESKTOP)
    check_runtime(PLAN, replace(RTX, platform="Windows x86_64"), DESKTOP)
    # A version that cannot be read without importing the module is compared after that.
    check_runtime(PLAN, record(), replace(ORIN, versions={"tensorrt": None}))
    for version in ("10.3.0", "10.3.1", "10.16.0", "11.4.0.106"):
        later = replace(ORIN, versions={"tensorrt": version})
        check_runtime(PLAN, record(version_compatible=True), later)
    check_device(PLAN, record(), "Orin", "8.7")
    check_device(PLAN, record(hardware_compatible=True), "NVIDIA A100", "8.0")
    check_device(PLAN, record(compute_capabilities=("8.7", "8.6"), device=""), "RTX A2000", "8.6")
    for capability in ("8.0", "8.6", "8.9", "12.0", "12.1", "13.0"):
        check_device(PLAN, RTX, "some GPU", capability)


@pytest.mark.parametrize("capability", ["8.7", "9.0", "10.0", "10.3", "11.0"])
@pytest.mark.parametrize("named", [(), ("8.6", "12.0")])
def test_a_gpu_that_tensorrt_rtx_does_not_run_on_is_told_of_tensorrt(
    capability: str, named: tuple[str, ...]
) -> None:
    """Measured on an H100: release 1.7.1 builds there, and does not load what it built."""
    plan = replace(RTX, compute_capabilities=named)
    with pytest.raises(EngineError) as caught:
        check_device(PLAN, plan, "NVIDIA H100 80GB HBM3", capability)
    assert not isinstance(caught.value, PlanMismatchError)  # another build would not run either
    assert str(caught.value).endswith(
        f"which runs on no GPU of compute capability {capability}, and this NVIDIA H100 80GB HBM3 "
        "is one; TensorRT runs on it."
    )
    assert "pip install 'ddpm-deploy[tensorrt]'" in caught.value.hint
    assert "--runtime tensorrt" in caught.value.hint
    assert f"--engine {plan.graph}" in caught.value.hint
    check_device(PLAN, record(), "Orin", "8.7")  # TensorRT itself runs on all of them


@pytest.mark.parametrize(
    ("said", "name", "capability", "message", "hint"),
    [
        (record(), "Orin Nano", "8.7", "was built on Orin and runs there alone; this is O", AGAIN),
        (record(), "Orin", "8.6", r"for compute capability 8\.7; this Orin has 8\.6", AGAIN),
        (
            replace(RTX, compute_capabilities=("8.6", "8.9")),
            "RTX 2080",
            "7.5",
            r"for compute capability 8\.6, 8\.9; this RTX 2080 has 7\.5",
            f"{AGAIN} --compute-capability 7.5",
        ),
        (
            RTX,
            "RTX 2080",
            "7.5",
            r"for compute capability 8\.0 and later; this RTX 2080 has 7\.5",
            f"{AGAIN} --compute-capability 7.5",
        ),
        (record(hardware_compatible=True), "T4", "7.5", r"8\.0 and later; this T4 has 7\.5", AGAIN),
    ],
)
def test_another_gpu_is_refused(
    said: Any, name: str, capability: str, message: str, hint: str
) -> None:
    with pytest.raises(PlanMismatchError, match=message) as caught:
        check_device(PLAN, said, name, capability)
    assert caught.value.hint == hint


def test_a_sidecar_without_a_command_says_how_to_build_one() -> None:
    with pytest.raises(PlanMismatchError) as caught:
        check_device(PLAN, record(command=""), "Orin", "8.6")
    assert caught.value.hint == "Build it again: ddpm-deploy build --fp16 -o unet.plan"


def test_without_cuda_bindings_a_good_plan_asks_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_runtime: None
) -> None:
    monkeypatch.setattr(match.Runtimes, "here", lambda: DESKTOP)
    with pytest.raises(MissingDependencyError, match="cuda-bindings is needed here") as caught:
        open_engine(write_plan(tmp_path / "unet.plan", RTX))
    assert caught.value.hint == "pip install 'ddpm-deploy[rtx]'"


@pytest.mark.parametrize(("jetson", "wanted"), [(True, "jetson"), (False, "tensorrt")])
def test_on_a_jetson_no_extra_brings_another_tensorrt_than_jetpack_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jetson: bool, wanted: str
) -> None:
    release = tmp_path / "nv_tegra_release"
    if jetson:
        release.write_text("# R36 (release), REVISION: 4.3\n")
    monkeypatch.setattr(flavour, "JETSON", release)
    assert flavour.extra("tensorrt") == wanted
    assert flavour.extra("tensorrt_rtx") == "rtx"


@pytest.mark.parametrize(
    ("files", "version"),
    [
        ({"tensorrt/__init__.py": '__version__ = "10.3.0"\n'}, "10.3.0"),  # JetPack's
        (
            {
                "tensorrt/__init__.py": "from tensorrt_bindings import *\n",
                "tensorrt_bindings/__init__.py": "x = 1\n__version__ = '11.4.0.106'\n",
            },
            "11.4.0.106",
        ),  # the wheels'
        ({"tensorrt/__init__.py": "from elsewhere import __version__\n"}, None),
        ({}, None),
    ],
)
def test_a_version_is_read_without_importing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    files: dict[str, str],
    version: str | None,
) -> None:
    for name in ("tensorrt", "tensorrt_bindings"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "raise AssertionError('it was imported')\n")
    elsewhere = [p for p in sys.path if not (Path(p) / "tensorrt").exists()]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *elsewhere])
    assert installed_version("tensorrt") == version


def test_an_installed_flavour_says_the_same_version_once_it_is_imported() -> None:
    rtx = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    assert installed_version("tensorrt_rtx") == rtx.__version__


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    assert read_record(write_plan(tmp_path / "unet.plan")) == record()
