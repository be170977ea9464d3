"""`sample --rebuild`: a plan for another machine is built again, and the images drawn."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")

from ddpm_deploy.cli import rebuild as rebuild_module
from ddpm_deploy.engines.flavour import installed
from ddpm_deploy.engines.plan import PlanRecord, read_record
from ddpm_deploy.engines.trt import TrtEngine
from tests.commands import builder, contents, finish, gone, refusal, run, start
from tests.engines.host_gpu import HostCuda, HostNetwork
from tests.engines.plans import BYTES, record, write_plan
from tests.support import tiny_spec, write_graph

rtx = pytest.mark.skipif(
    "tensorrt_rtx" not in installed(), reason="tensorrt_rtx is not installed: no plan can be built"
)
UNET, PLAN = Path("unet.onnx"), Path("unet.plan")
MINE = "ddpm-deploy build unet.onnx --fp16 --runtime rtx --batch 1:2:4 -o unet.plan"
AGAIN = "ddpm-deploy build unet.onnx --fp16 --runtime rtx --batch 1:2:4 --force -o unet.plan"

WITH_GPU = """
from ddpm_deploy.cli import rebuild
from ddpm_deploy.cli.app import main
rebuild.find_device = lambda: True
main()
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a graph and a plan of TensorRT-RTX 1.0, in which every command runs."""
    monkeypatch.chdir(tmp_path)
    write_graph(UNET, tiny_spec())
    write_plan(PLAN, old())
    return tmp_path


def old(**changes: Any) -> PlanRecord:
    return record(
        flavour="tensorrt_rtx",
        version="1.0.0.1",
        platform="Linux x86_64",
        device="",
        compute_capabilities=(),
        command=MINE,
        **changes,
    )


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes this machine one with a GPU, as far as is asked before a build."""
    monkeypatch.setattr(rebuild_module, "find_device", lambda: HostCuda().device)


@pytest.fixture
def host_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a plan run on host memory: ONNX Runtime computes its graph."""

    def opened(path: Path, said: PlanRecord, *, device: str = "auto") -> TrtEngine:
        cuda = HostCuda()
        batches = [range(p.least, p.most + 1) for p in said.profiles]
        return TrtEngine(path, said, cuda, HostNetwork(cuda, path.parent / said.graph, batches))

    monkeypatch.setattr(TrtEngine, "open", opened)


@rtx
@pytest.mark.usefixtures("gpu", "host_gpu")
def test_a_plan_of_another_version_is_built_again_and_sampled() -> None:
    outcome = run("sample", "-e", PLAN, "-n", 2, "--rebuild")
    assert outcome.code == 0, outcome.err
    said = outcome.err.splitlines()
    assert said[0].startswith("unet.plan was built by TensorRT-RTX 1.0.0.1 and loads in no other")
    assert said[1] == f"building it again: {AGAIN}"
    assert said[-1].startswith("sampling on TensorRT-RTX GPU: 20 steps in ")
    # The plan's path is the result of build, not of sample.
    assert outcome.out.splitlines()[0] == "samples/000000.png"
    built = read_record(PLAN)
    assert (built.precision, built.graph) == ("fp16", "unet.onnx")
    assert [str(profile) for profile in built.profiles] == ["1:2:4"]
    assert json.loads(Path("samples/run.json").read_text())["engine"] == "unet.plan"
    # Now it is this machine's, and nothing is built.
    again = run("sample", "-e", PLAN, "-n", 2, "--rebuild")
    assert "built" not in again.err
    assert read_record(PLAN) == built


@rtx
@pytest.mark.usefixtures("gpu", "host_gpu")
def test_a_run_of_the_old_plan_is_not_continued_with_the_new_one() -> None:
    run("build", UNET, "--fp32", "-o", PLAN, "--batch", 1)
    assert run("sample", "-e", PLAN, "-n", 1).code == 0
    other = replace(read_record(PLAN), version="1.0.0.1", command=MINE)
    write_plan(PLAN, other, content=PLAN.read_bytes())
    before = contents(Path("samples"))
    outcome = run("sample", "-e", PLAN, "-n", 2, "--rebuild")
    assert outcome.code == 2
    assert "error: samples holds another run: engine sha256 was " in outcome.err
    assert "hint: Name another folder with -o, or type --overwrite" in outcome.err
    assert contents(Path("samples")) == before


def test_without_rebuild_the_hint_names_the_command_and_the_option(folder: Path) -> None:
    before = contents(folder)
    outcome = run("sample", "-e", PLAN)
    assert refusal(outcome).startswith("unet.plan was built by TensorRT-RTX 1.0.0.1")
    assert f"Build it again: {MINE}\nWith unet.onnx beside the plan, --rebuild does" in outcome.err
    assert contents(folder) == before


def _cut(plan: Path) -> None:
    plan.write_bytes(BYTES[:-1])


def _edit(plan: Path) -> None:
    plan.with_name("unet.plan.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_cut, "unet.plan has 1,049 bytes; its sidecar says 1,050."),
        (_edit, "unet.plan.json is damaged"),
        (Path.unlink, "There is no file unet.plan."),
    ],
)
def test_a_damaged_plan_is_not_built_again(folder: Path, damage: Any, said: str) -> None:
    damage(PLAN)
    before = contents(folder)
    outcome = run("sample", "-e", PLAN, "--rebuild")
    message = refusal(outcome)
    assert message.startswith(said)
    assert message.endswith("So --rebuild cannot know what to build.")
    assert "ddpm-deploy build" in outcome.err
    assert contents(folder) == before


def test_a_graph_that_is_not_there_is_asked_for() -> None:
    UNET.unlink()
    outcome = run("sample", "-e", PLAN, "--rebuild")
    assert "its graph unet.onnx is not beside it" in refusal(outcome)


def test_without_a_gpu_nothing_is_built(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rebuild_module, "find_device", lambda: None)
    before = contents(folder)
    outcome = run("sample", "-e", PLAN, "--rebuild")
    assert refusal(outcome).startswith("unet.plan is not built again: there is no NVIDIA GPU here")
    assert "hint: Run its graph on the CPU: --engine unet.onnx" in outcome.err
    assert contents(folder) == before


def test_an_engine_that_is_no_plan_is_refused() -> None:
    message = refusal(run("sample", "-e", UNET, "--rebuild"))
    assert message == "--rebuild is for a TensorRT plan; unet.onnx is none."


@rtx
@pytest.mark.usefixtures("gpu")
def test_a_build_that_fails_has_one_message_and_leaves_the_plan(folder: Path) -> None:
    write_plan(PLAN, old(spec=tiny_spec(size=16)))
    UNET.write_bytes(b"no graph")
    before = contents(folder)
    outcome = run("sample", "-e", PLAN, "--rebuild")
    assert "unet.onnx is no ONNX file" in refusal(outcome)
    assert contents(folder) == before


@rtx
def test_ctrl_c_while_building_again_is_one_message_and_leaves_the_plan(folder: Path) -> None:
    before = contents(folder)
    process = start("sample", "-e", PLAN, "--rebuild", python=["-c", WITH_GPU])
    child = builder(process)
    process.send_signal(signal.SIGINT)
    outcome = finish(process)
    assert (outcome.code, outcome.out) == (130, "")
    assert outcome.err.splitlines()[1:] == [
        f"building it again: {AGAIN}",
        "interrupted; nothing half-written is left behind",
    ]
    assert gone(child)
    assert contents(folder) == before
