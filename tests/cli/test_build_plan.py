from __future__ import annotations

import json
import os
import shlex
import signal
import time
from pathlib import Path
from typing import Any

import onnx
import pytest

from ddpm_deploy import Engine, open_engine
from ddpm_deploy.cli import build as build_command
from ddpm_deploy.cli.plan import _clock
from ddpm_deploy.engines import device as device_module
from ddpm_deploy.engines import flavour as flavour_module
from ddpm_deploy.engines import trt_build
from ddpm_deploy.engines.build_settings import BuildSettings
from ddpm_deploy.engines.cuda import Cuda
from ddpm_deploy.engines.device import Device
from ddpm_deploy.engines.flavour import installed
from ddpm_deploy.engines.plan import PlanRecord, read_record
from ddpm_deploy.engines.trt import TrtEngine
from ddpm_deploy.engines.trt_build import Building, Prepared
from ddpm_deploy.errors import EngineError, PlanMismatchError
from ddpm_deploy.export import prepare as prepare_module
from ddpm_deploy.export.precision import recorded
from ddpm_deploy.export.prepare import Lowered
from tests.commands import Outcome, builder, contents, finish, gone, refusal, run, start
from tests.support import tiny_spec, write_graph

rtx = pytest.mark.skipif(
    "tensorrt_rtx" not in installed(), reason="tensorrt_rtx is not installed: no plan can be built"
)
DIGITS = Path(__file__).parents[2] / "demo" / "digits.pt"
UNET, PLAN = Path("unet.onnx"), Path("unet.plan")
FAKE = Path(__file__).parents[1] / "engines" / "fake_worker.py"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a graph in it, in which every command runs."""
    monkeypatch.chdir(tmp_path)
    write_graph(UNET, tiny_spec())
    return tmp_path


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's network as an ONNX file: 0.5 M weights, whose plan takes seconds."""
    path = tmp_path_factory.mktemp("digits") / "digits.onnx"
    outcome = run("export", DIGITS, "-o", path)
    assert outcome.code == 0, outcome.err
    return path


def build(*arguments: object) -> Outcome:
    return run("build", *arguments)


@rtx
@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_a_precision_makes_a_plan_that_sample_s_line_names(precision: str) -> None:
    outcome = build(f"--{precision}")
    assert (outcome.code, outcome.out) == (0, "unet.plan\n"), outcome
    assert f"in {precision} in " in outcome.err
    assert outcome.err.startswith(
        "built with TensorRT-RTX "
        if precision == "fp32"
        else f"measuring {precision} against float32 on x_t of 10 timesteps\nbuilt with "
    )
    assert (
        "it runs on GPUs of Ampere and later (GeForce RTX 30, 40, 50), x86_64, with " in outcome.err
    )
    assert "draw images there: ddpm-deploy sample --engine unet.plan" in outcome.err
    record = read_record(PLAN)
    assert record.precision == precision
    assert bool(record.precision_groups) == (precision != "fp32")
    assert sorted(contents(Path())) == ["unet.onnx", "unet.plan", "unet.plan.json"]


@rtx
@pytest.mark.parametrize("arguments", [["-o", "new/a.plan"], ["--runtime", "rtx"]])
def test_a_plan_s_name_or_a_runtime_makes_a_plan_in_float32(arguments: list[str]) -> None:
    outcome = build(*arguments)
    assert read_record(Path(outcome.out.strip())).precision == "fp32"


@rtx
def test_half_precision_is_in_the_plan_s_network(digits: Path) -> None:
    half = json.loads(build(digits, "--fp16", "-o", "a.plan", "--batch", "1:2:4", "--json").out)
    whole = json.loads(build(digits, "--fp32", "-o", "b.plan", "--batch", "2", "--json").out)
    assert (half["path"], half["reused"], half["profiles"]) == ("a.plan", False, ["1:2:4"])
    convolutions = whole["layers"]["CONVOLUTION FLOAT"]
    assert half["layers"]["CONVOLUTION HALF"] > 0.9 * convolutions
    # The islands, where half precision is known to fail, stay.
    for island in ("NORMALIZATION", "SOFTMAX"):
        assert half["layers"][f"{island} FLOAT"] == whole["layers"][f"{island} FLOAT"]
        assert f"{island} HALF" not in half["layers"]
    assert not any(name.endswith("HALF") for name in whole["layers"])


@rtx
def test_an_unchanged_build_says_so_and_force_builds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    build("--fp16")
    before = PLAN.read_bytes()
    again = build("--fp16")
    assert (again.code, again.out) == (0, "unet.plan\n")
    assert again.err.startswith("unet.plan is up to date: graph, options, TensorRT-RTX ")
    assert PLAN.read_bytes() == before
    other = build("--fp32", "--batch", "1")
    assert other.err.startswith("it replaces a plan that differed in the batches, the precision\n")
    assert build("--fp32", "--batch", "1", "--force").err.startswith("built with ")


@rtx
def test_the_command_in_the_sidecar_makes_the_same_plan_again() -> None:
    build("--fp16", "--batch", "1", "--batch", "2:3:4", "--compute-capability", "8.6")
    command = shlex.split(read_record(PLAN).command)
    outcome = run(*command[1:])
    assert "unet.plan is up to date" in outcome.err


@rtx
def test_the_step_can_stand_behind_the_network() -> None:
    assert build("--fp16", "--batch", "1:2:4").code == 0
    before = read_record(PLAN)
    outcome = build("--fp16", "--batch", "1:2:4", "--fuse-step")
    assert "it replaces a plan that differed in the step behind the network" in outcome.err
    record = read_record(PLAN)
    assert (before.fused_step, record.fused_step) == (False, True)
    assert sum(record.layers.values()) > sum(before.layers.values())
    assert "--fuse-step" in record.command


@rtx
def test_named_devices_are_named_in_words() -> None:
    outcome = build("--fp16", "--compute-capability", "8.9", "--compute-capability", "12.0")
    assert "8.9 (GeForce RTX 40, RTX Ada, L4, L40), 12.0 (GeForce RTX 50" in outcome.err
    assert read_record(PLAN).compute_capabilities == ("8.9", "12.0")


@rtx
def test_the_converted_graph_can_be_kept() -> None:
    build("--fp16", "--keep-graph")
    kept = recorded(onnx.load_model("unet.fp16.onnx"))
    assert kept is not None
    assert kept.precision == "fp16"
    assert build("unet.fp16.onnx", "--fp16").out == "unet.fp16.plan\n"
    assert "unet.fp16.onnx is in fp16 already" in refusal(build("unet.fp16.onnx", "--fp32"))


@rtx
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fp16", "--bf16"], "A plan has one precision, and --fp16 and --bf16 are given."),
        (["--fp16", "--batch", "4:2:1"], "A profile is MIN:OPT:MAX with 1 <= MIN <= OPT <= MAX"),
        (["--fp16", "--batch", "many"], "A profile is MIN:OPT:MAX, such as 1:8:32, or one"),
        (["--fp16", "--threads", "2"], "--threads is for the check of an ONNX Runtime engine."),
        (["--fp16", "--device", "cpu"], "--device is for the check of an ONNX Runtime engine."),
        (["--fp16", "--timing-cache", "t"], "--timing-cache is for TensorRT: TensorRT-RTX"),
        (["--fp16", "--version-compatible"], "--version-compatible is for TensorRT"),
        (["--fp16", "--hardware-compatible"], "--hardware-compatible is for TensorRT"),
        (["--fp16", "--compute-capability", "8.7"], "cannot build for 8.7 by name; it knows 7.5"),
        (["--fp16", "missing.onnx"], "There is no file missing.onnx."),
        (["--fp16", "garbage.onnx"], "garbage.onnx is no ONNX file: "),
        (["--fp16", "bare.onnx"], "bare.onnx carries no ddpm-deploy spec"),
        (["--fp16", "unet.pt"], "unet.pt is a checkpoint; build takes the ONNX file made from it."),
        (["--fp16", "-o", "taken.plan"], "Is a directory: taken.plan."),
        (["--fp16", "-o", "beside.plan"], "Is a directory: beside.plan.json."),
        (["--fp16", "-o", "garbage.onnx/a.plan"], "A file stands where a folder is needed"),
    ],
)
def test_what_cannot_be_is_one_message_and_leaves_nothing(
    folder: Path, arguments: list[str], message: str
) -> None:
    Path("garbage.onnx").write_bytes(b"garbage")
    write_graph(Path("bare.onnx"), None)
    for name in ("taken.plan", "beside.plan.json"):
        Path(name).mkdir()
    before = contents(folder)
    assert message in refusal(build("--runtime", "rtx", *arguments))
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--runtime", "cuda"], "'cuda' is none of auto, tensorrt, rtx, onnxruntime"),
        (["--runtime", "onnxruntime", "-o", "a.plan"], "a.plan must end in .onnx"),
        (["--fp16", "-o", "a.engine"], "a.engine must end in .plan"),
        (["--fp16", "--optimization-level", "6"], "--optimization-level"),
        (["--fp16", "--workspace", "0"], "--workspace"),
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], message: str) -> None:
    outcome = build(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err


@pytest.mark.parametrize("arguments", [["--fp16"], ["-o", "unet.plan"]])
def test_without_any_tensorrt_each_machine_s_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setattr(flavour_module, "installed", list)
    outcome = build(*arguments)
    assert refusal(outcome) == (
        "A plan is built by TensorRT, and neither TensorRT nor TensorRT-RTX is installed."
    )
    for line in ("ddpm-deploy[rtx]", "ddpm-deploy[tensorrt]", "--system-site-packages"):
        assert line in outcome.err


@pytest.mark.parametrize(("gpu", "flavour"), [(True, "tensorrt"), (False, "tensorrt_rtx")])
def test_of_two_runtimes_tensorrt_is_for_the_gpu_that_is_here(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, flavour: str
) -> None:
    monkeypatch.setattr(flavour_module, "installed", lambda: ["tensorrt", "tensorrt_rtx"])
    monkeypatch.setattr(device_module, "find_device", lambda: object() if gpu else None)
    assert build_command._choose_flavour("auto") == flavour
    assert build_command._choose_flavour("rtx") == "tensorrt_rtx"


def test_the_batches_are_a_gpu_s_if_left_out() -> None:
    for size, profile in ((8, "1:64:64"), (32, "1:8:8"), (64, "1:8:8")):
        (only,) = build_command._profiles(None, tiny_spec(size=size))
        assert str(only) == profile


@pytest.fixture
def jetson(monkeypatch: pytest.MonkeyPatch) -> None:
    """A TensorRT that runs out of memory but for batches of 1: a stand-in for its process."""
    monkeypatch.setattr(trt_build, "WORKER", (str(FAKE),))
    monkeypatch.setattr(flavour_module, "installed", lambda: ["tensorrt"])
    orin: dict[str, Any] = {"name": "Orin", "compute_capability": "8.7", "memory": 8 * 2**30}
    device = {**orin, "integrated": True, "driver": "12.6"}
    told = {"device": device, "then": "out of memory", "fits": ["1:1:1"]}
    monkeypatch.setenv("FAKE_WORKER", json.dumps(told))


@pytest.mark.usefixtures("jetson")
def test_out_of_memory_offers_smaller_builds_as_lines_to_type(folder: Path) -> None:
    before = contents(folder)
    outcome = build("--fp16")
    assert refusal(outcome).startswith("TensorRT 10.3.0 ran out of memory after 0 s")
    typed = [line.split() for line in outcome.err.splitlines() if "  ddpm-deploy build" in line]
    assert len(typed) == 3
    assert contents(folder) == before
    assert build(*typed[1][2:]).code == 2  # each is a command that runs
    assert build(*typed[2][2:]).code == 0


@pytest.mark.usefixtures("jetson")
def test_retry_smaller_goes_down_the_ladder_and_says_what_it_gave_up() -> None:
    outcome = build("--fp16", "--retry-smaller")
    assert (outcome.code, outcome.out) == (0, "unet.plan\n"), outcome.err
    assert outcome.err.count("Trying again without ") == 3
    assert "it does without kernels that need much scratch memory, and without " in outcome.err
    record = read_record(PLAN)
    assert str(*record.profiles) == "1:1:1"
    assert (record.options["workspace"], record.options["optimization_level"]) == (256, 1)


@pytest.mark.usefixtures("jetson")
def test_a_ladder_that_ends_is_an_error() -> None:
    told = json.loads(os.environ["FAKE_WORKER"])
    os.environ["FAKE_WORKER"] = json.dumps({**told, "fits": []})
    outcome = build("--fp16", "--retry-smaller")
    assert "ran out of memory" in refusal(outcome)
    assert "ddpm-deploy build" not in outcome.err


@pytest.mark.parametrize("retry", [True, False])
@pytest.mark.usefixtures("jetson")
def test_a_plan_too_large_for_the_device_gives_up_the_batch_alone(
    monkeypatch: pytest.MonkeyPatch, folder: Path, retry: bool
) -> None:
    def prepare(graph: Path, settings: BuildSettings, _: Path, *, lowered: Lowered) -> Prepared:
        return Prepared(path=graph, memory=settings.profiles[0].most * 2**30)

    monkeypatch.setattr(prepare_module, "prepare_graph", prepare)
    outcome = build("--fp16", "--batch", "1:4:16", *(["--retry-smaller"] if retry else []))
    message = "A batch of 16 needs about 16.0 GiB; Orin has 8.0 GiB."
    if retry:
        assert f"\n{message} Trying again without batches: " in outcome.err
        record = read_record(PLAN)
        assert (str(*record.profiles), record.memory) == ("1:1:1", 2**30)
        assert set(record.options.values()) == {None}
    else:
        assert refusal(outcome) == message
        assert outcome.err.count("  ddpm-deploy build") == 1
        assert sorted(contents(folder)) == ["unet.onnx"]


def test_in_a_pipe_the_clock_speaks_once_a_minute(capsys: pytest.CaptureFixture[str]) -> None:
    with _clock("building") as watch:
        for seconds in range(190):
            watch(Building(seconds=float(seconds), last=125.0))
    assert capsys.readouterr().err.splitlines() == [
        "building: 60 s (last time 2 min 05 s)",
        "building: 2 min 00 s (last time 2 min 05 s)",
        "building: 3 min 00 s (last time 2 min 05 s)",
    ]


def test_on_a_terminal_the_clock_shows_names_as_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich's way to say that this is a terminal
    with _clock("building a[/x].plan") as watch:
        watch(Building(seconds=3.0, last=None))
    assert "building a[/x].plan" in capsys.readouterr().err


@rtx
def test_ctrl_c_ends_both_processes_and_leaves_nothing(folder: Path, digits: Path) -> None:
    before = contents(folder)
    process = start("build", digits, "--fp32", "-o", "unet.plan")
    child = builder(process)
    time.sleep(0.5)  # the demo's plan takes a second and more, after the runtime was loaded
    process.send_signal(signal.SIGINT)
    outcome = finish(process)
    assert outcome == Outcome(130, "", "interrupted; nothing half-written is left behind\n")
    assert gone(child)
    assert contents(folder) == before


@rtx
def test_a_build_that_the_system_kills_offers_the_ladder(folder: Path, digits: Path) -> None:
    before = contents(folder)
    process = start("build", digits, "--fp32", "-o", "unet.plan")
    os.kill(builder(process), signal.SIGKILL)
    outcome = finish(process)
    assert refusal(outcome).startswith("The system killed the build after ")
    assert "--batch 1:1:1" in outcome.err
    assert contents(folder) == before


@rtx
def test_the_building_process_does_not_outlive_its_command(digits: Path) -> None:
    process = start("build", digits, "--fp32", "-o", "unet.plan")
    child = builder(process)
    process.kill()
    finish(process)
    assert gone(child)


@rtx
@pytest.mark.parametrize(
    ("bias", "said"),
    [
        (0.0, "on this GPU its output is at most 0.0e+00 of the peak from the graph's\n"),
        (0.01, "that is more than 5e-03, what rounding explains: see ddpm-deploy verify"),
        (0.5, "error: TensorRT-RTX 1.7.1.116 built another function than the graph: on this GPU"),
        (float("nan"), "they differ by inf of the peak. Nothing was written."),
    ],
)
def test_where_its_gpu_is_a_plan_is_compared_with_its_graph(
    monkeypatch: pytest.MonkeyPatch, folder: Path, bias: float, said: str
) -> None:
    # A stand-in for a GPU: what it runs is a graph, with a fault or without, in ONNX Runtime.
    other = write_graph(folder / "other" / "unet.onnx", tiny_spec(), bias=bias)
    monkeypatch.setattr(device_module, "find_device", object)
    monkeypatch.setattr(TrtEngine, "open", lambda _plan, _record: open_engine(other))
    before = contents(folder)
    outcome = build("--fp16")
    assert said in outcome.err
    refused = not bias < 0.1
    assert outcome.code == (2 if refused else 0)
    assert refused == (contents(folder) == before)


@rtx
def test_a_plan_for_other_gpus_is_built_without_the_comparison(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def open_there(_plan: Path, _record: PlanRecord) -> Engine:
        raise PlanMismatchError("it is for another GPU.", command="")

    monkeypatch.setattr(device_module, "find_device", object)
    monkeypatch.setattr(TrtEngine, "open", open_there)
    outcome = build("--fp16")
    assert outcome.code == 0
    assert "the plan was not compared with its graph here: it is for another GPU." in outcome.err


@rtx
def test_a_plan_that_this_gpu_will_not_run_is_built_and_said_to_be_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    h100 = Device(
        name="NVIDIA H100", compute_capability="9.0", memory=1, integrated=False, driver="13.0"
    )
    monkeypatch.setattr(device_module, "find_device", lambda: h100)
    monkeypatch.setattr(Cuda, "open", lambda: Cuda(h100))
    outcome = build("--fp16")
    assert outcome.code == 0
    assert "runs on no GPU of compute capability 9.0, and this NVIDIA H100 is one; TensorRT" in (
        " ".join(outcome.err.split())
    )
    assert run("inspect", str(PLAN)).code == 0
    with pytest.raises(EngineError, match=r"runs on no GPU of compute capability 9\.0") as caught:
        open_engine(PLAN)
    assert "memory" not in caught.value.hint
    assert "ddpm-deploy[tensorrt]" in caught.value.hint


@rtx
def test_a_graph_s_own_precision_need_not_be_typed() -> None:
    assert build("--fp16", "--runtime", "onnxruntime").code == 0
    assert build("unet.fp16.onnx", "--runtime", "rtx", "-o", "unet.plan").code == 0
    assert read_record(PLAN).precision == "fp16"


@rtx
def test_what_turing_lacks_is_said(digits: Path) -> None:
    outcome = build(digits, "--fp32", "--compute-capability", "7.5")
    assert outcome.code == 2
    assert "has no float32 matrix products for Turing (7.5)" in outcome.err
    assert " hint: Leave --compute-capability 7.5 out; for a Turing GPU" in outcome.err


@rtx
def test_the_graph_of_a_plan_that_is_there_can_be_kept_too() -> None:
    build("--fp16")
    kept = Path("unet.fp16.onnx")
    assert not kept.exists()
    assert "is up to date" in build("--fp16", "--keep-graph").err
    assert recorded(onnx.load_model(kept)) is not None


@rtx
def test_a_place_that_cannot_be_written_is_noticed_before_the_work(folder: Path) -> None:
    (folder / "unet.plan").mkdir()
    outcome = build("--fp16")
    assert outcome.code == 2
    assert "measuring" not in outcome.err
    assert contents(folder) == {"unet.onnx": UNET.read_bytes(), "unet.plan": None}
