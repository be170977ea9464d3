"""Every command that runs a plan refuses one that it cannot run, in one message."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddpm_deploy.engines.match import Runtimes
from tests.commands import contents, refusal, run
from tests.engines.plans import BYTES, record, write_plan
from tests.support import tiny_spec, write_graph

COMMANDS = (
    "sample -e unet.plan",
    "verify -e unet.plan --against unet.onnx",
    "verify -e unet.onnx --against unet.plan",
    "bench -e unet.plan --no-memory",  # which another process would measure, unpatched
    "nll -e unet.plan --data digits",
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a graph in it, on a Jetson with TensorRT 10.3.0."""
    monkeypatch.chdir(tmp_path)
    here = Runtimes(versions={"tensorrt": "10.3.0"}, platform="Linux aarch64")
    monkeypatch.setattr(Runtimes, "here", lambda: here)
    write_graph(Path("unet.onnx"), tiny_spec())
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_a_plan_that_was_cut_is_refused(folder: Path, command: str) -> None:
    write_plan(Path("unet.plan"), content=BYTES[:-1])
    before = contents(folder)
    outcome = run(*command.split())
    assert refusal(outcome).startswith("unet.plan has 1,049 bytes; its sidecar says 1,050.")
    assert f"Build it again: {record().command}" in outcome.err
    assert contents(folder) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_a_plan_for_another_version_is_refused(folder: Path, command: str) -> None:
    write_plan(Path("unet.plan"), record(version="8.5.2"))
    before = contents(folder)
    outcome = run(*command.split())
    assert "was built by TensorRT 8.5.2 and loads in no other version" in refusal(outcome)
    assert f"Build it again: {record().command}" in outcome.err
    assert contents(folder) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_without_a_gpu_the_graph_is_named_that_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    cuda = pytest.importorskip("ddpm_deploy.engines.cuda", reason="cuda-bindings is not installed")

    def no_driver() -> None:
        raise RuntimeError("libcuda.so.1")  # how cuda-bindings says it

    monkeypatch.setattr(cuda.cudart, "cudaDriverGetVersion", no_driver)
    write_plan(Path("unet.plan"))
    before = contents(folder)
    outcome = run(*command.split())
    assert refusal(outcome).startswith("unet.plan does not run here. There is no NVIDIA driver")
    assert "Or run its graph on the CPU: --engine unet.onnx" in outcome.err
    assert contents(folder) == before


def test_beside_an_engine_that_runs_a_plan_that_does_not_is_told() -> None:
    write_plan(Path("unet.plan"))
    Path("unet.plan").write_bytes(BYTES[:-1])
    quick = ("--steps", 2, "--repeat", 1, "--no-memory")
    timed = run("bench", "-e", "unet.onnx", "-e", "unet.plan", *quick)
    assert timed.code == 0, timed
    assert "not timed: unet.plan: unet.plan has" in timed.out


def test_a_plan_has_no_loop_in_pytorch() -> None:
    write_plan(Path("unet.plan"))
    message = refusal(run("bench", "-e", "unet.onnx", "--against", "unet.plan"))
    assert message == "unet.plan is no checkpoint, so it has no loop in PyTorch."
