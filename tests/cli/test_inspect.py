from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from ddpm_deploy import Condition, ModelSpec
from ddpm_deploy.engines import device as device_module
from ddpm_deploy.engines.device import Device
from ddpm_deploy.engines.match import Runtimes
from ddpm_deploy.export.fuse_step import fuse_step
from ddpm_deploy.export.precision import convert
from ddpm_deploy.files import sha256
from tests.commands import contents, finish, refusal, run, start
from tests.engines.plans import BYTES, record, write_plan
from tests.support import tiny_spec, write_checkpoint, write_graph


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a graph in it, in which every command runs."""
    monkeypatch.chdir(tmp_path)
    write_graph(Path("unet.onnx"), tiny_spec(classes=4))
    return tmp_path


def rows(file: str) -> dict[str, str]:
    """Returns the table of a file: its left column to its right, wrapped lines joined."""
    outcome = run("inspect", file)
    assert outcome.code == 0, outcome
    assert all(line == line.rstrip() for line in outcome.out.splitlines())
    found: dict[str, str] = {}
    key = ""
    for line in outcome.out.partition("build it again:")[0].splitlines():
        name, text = line.split("  ", 1)
        key = name or key
        found[key] = f"{found.get(key, '')} {text.strip()}".strip()
    return found


def test_a_graph_says_what_it_is() -> None:
    said = rows("unet.onnx")
    assert said["file"] == "unet.onnx"
    assert said["sha256"] == sha256(Path("unet.onnx"))
    assert said["is"] == "ONNX graph, opset 20, IR version 10"
    assert said["size"] == f"{Path('unet.onnx').stat().st_size / 1000:.1f} kB"
    assert said["samples"] == "1 x 8 x 8, values -1 to 1"
    assert said["schedule"] == "linear (start 0.001, end 0.2), T = 20"
    assert said["predicts"] == "epsilon, variance fixed_small"
    assert said["x_0"] == "clipped to ±1"
    assert said["trained at"] == "t = 0 to 19"
    assert said["family"] == "test"
    assert said["checkpoint"] == "not recorded"
    assert said["condition y"] == "class_label, int64 (), 4 classes, 4 for none"
    assert said["input x"] == "float32 (batch, 1, 8, 8)"
    assert said["input y"] == "int64 (batch)"
    assert said["output out"] == "float32 (batch, 1, 8, 8)"
    assert (said["step"], said["precision"]) == ("in NumPy", "fp32")
    # Of write_graph: 11 nodes; four numbers in float32 and four in int64.
    assert said["nodes"] == "11: 3 Mul, 3 Add, 2 Cast, 2 Reshape, 1 Tanh"
    assert said["weights"] == "8 numbers, 48 bytes"


def test_a_checkpoint_says_the_same_as_its_graph() -> None:
    write_checkpoint(Path("ckpt.pt"), classes=4)
    graph, checkpoint = rows("unet.onnx"), rows("ckpt.pt")
    assert checkpoint["is"] == "checkpoint, for torch CPU"
    assert checkpoint["checkpoint"] == checkpoint["sha256"] == sha256(Path("ckpt.pt"))
    names = ["samples", "schedule", "predicts", "x_0", "sampler", "trained at", "family"]
    for name in [*names, "written by", "condition y"]:
        assert checkpoint[name] == graph[name]


def inspected(file: object) -> dict[str, Any]:
    """Returns the JSON of a file."""
    data: dict[str, Any] = json.loads(run("inspect", file, "--json").out)
    return data


def test_the_spec_in_the_json_reads_back() -> None:
    data = inspected("unet.onnx")
    assert ModelSpec.from_dict(data["spec"]) == tiny_spec(classes=4)
    assert (data["file"], data["kind"], data["fused"]) == ("unet.onnx", "onnx", False)
    assert data["bytes"] == Path("unet.onnx").stat().st_size
    write_checkpoint(Path("ckpt.pt"), classes=4)
    data = inspected("ckpt.pt")
    assert (data["kind"], data["engine"], data["fused"]) == ("checkpoint", "torch CPU", False)


def test_a_network_s_memory_is_that_of_one_image_and_of_sample_s_batch() -> None:
    data = inspected("unet.onnx")
    # 8 x 8 pixels: 64 at once. x and what is made of it, in float32, are alive at least.
    assert [each["batch"] for each in data["memory"]] == [1, 64]
    for each in data["memory"]:
        assert each["weights"] == 48
        assert each["activations"] >= each["batch"] * 2 * 64 * 4
        assert each["total"] == each["weights"] + each["activations"]
    assert data["attention"] == []


def test_a_network_s_attention_is_listed_with_its_matrix(exported: Path) -> None:
    (whole,) = (a for a in inspected(exported / "unet.onnx")["attention"] if a["queries"] == 64)
    # All of 8 x 8 pixels see each other: 64 x 64 scores a head, in float32.
    assert (whole["keys"], whole["whole_bytes"]) == (64, whole["heads"] * 64 * 64 * 4)
    said = rows(str(exported / "unet.onnx"))
    assert f"with {whole['heads']} heads" in run("inspect", exported / "unet.onnx").out
    assert " with attention's scores stored: weights " in said["memory"]


def test_half_precision_and_a_fused_step_are_told(exported: Path) -> None:
    mixed = convert(onnx.load_model(exported / "unet.onnx"), "fp16")
    onnx.save_model(fuse_step(mixed.model), "half.onnx")
    data = inspected("half.onnx")
    assert (data["fused"], data["precision"]) == (True, "fp16")
    assert data["precision_groups"] == dict(mixed.groups)
    said = rows("half.onnx")
    assert (said["step"], said["precision"]) == ("fused behind the network", "fp16")
    text = " ".join(run("inspect", "half.onnx").out.split())
    for group, operators in mixed.groups.items():
        assert f"{group.removeprefix('float32, ')}: {operators}".removeprefix("fp16: ") in text
    assert said["input row"] == "float32 (9)"


def test_a_graph_without_a_spec_says_what_it_is_and_that() -> None:
    write_graph(Path("bare.onnx"), None)
    said = rows("bare.onnx")
    assert said["spec"].startswith("none: no other command takes this file")
    assert said["input x"] == "float32 (batch, 1, 8, 8)"
    assert "precision" not in said
    data = inspected("bare.onnx")
    assert (data["spec"], data["precision"], data["opset"]) == (None, None, 20)


def test_without_onnx_the_rest_is_told_and_what_to_install() -> None:
    told = inspected("unet.onnx")
    code = "import sys; sys.modules['onnx'] = None; from ddpm_deploy.cli.app import main; main()"
    outcome = finish(start("inspect", "unet.onnx", "--json", python=["-c", code]))
    assert outcome.code == 0, outcome.err
    assert outcome.err == (
        "note: opset, weights, attention and memory need onnx: pip install onnx\n"
    )
    less = json.loads(outcome.out)
    assert less.items() <= told.items()
    assert told.keys() - less.keys() >= {"opset", "nodes", "weights", "attention", "memory"}


def test_a_plan_says_what_its_sidecar_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "find_device", lambda: None)
    groups = {"fp16": "29 Conv", "float32, statistics: softmax": "6 Softmax"}
    layers = {"MATRIX_MULTIPLY HALF": 36, "SOFTMAX FLOAT": 6, "CONVOLUTION HALF": 29}
    plan = record(
        precision_groups=groups,
        layers=layers,
        fused_step=True,
        memory=150_000_000,
        seconds=125.0,
        tool="ddpm-deploy 0.1.0",
    )
    write_plan(Path("unet.plan"), plan)
    said = rows("unet.plan")
    assert said["is"] == "plan of TensorRT 10.3.0"
    assert said["sha256"] == plan.plan_sha256
    assert said["schedule"] == "linear (start 0.001, end 0.2), T = 20"
    assert said["runs"] == "on Orin, with TensorRT 10.3.0"
    assert said["runs here"].startswith("no: unet.plan was built on Linux aarch64; this is ")
    assert said["batches"] == "1 to 8, fastest at 8"
    assert (said["step"], said["precision"]) == ("fused behind the network", "fp16")
    assert (said["in fp16"], said["in float32"]) == ("29 Conv", "statistics: softmax: 6 Softmax")
    assert said["fp16 layers"] == "36 matrix multiply, 29 convolution"
    assert said["fp32 layers"] == "6 softmax"
    assert said["memory"] == "about 150.0 MB at batch 8"
    assert said["built"] == "in 2 min 05 s on Linux aarch64 by ddpm-deploy 0.1.0"
    assert run("inspect", "unet.plan").out.endswith(f"build it again:\n  {plan.command}\n")


def test_brackets_in_names_are_no_markup() -> None:
    write_plan(Path("[i].plan"), record(tool="[/bold]", layers={"[/b] HALF": 1}))
    said = rows("[i].plan")
    assert said["file"] == "[i].plan"
    assert said["built"].endswith("by [/bold]")
    assert said["fp16 layers"] == "1 [/b]"


def test_a_plan_s_json_is_its_sidecar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "find_device", lambda: None)
    write_plan(Path("unet.plan"))
    data = inspected("unet.plan")
    assert data["runs_here"] is False
    assert data["refusal"].startswith("unet.plan was built on Linux aarch64; this is ")
    assert data["hint"] == f"Build it again: {record().command}"
    written = json.loads(Path("unet.plan.json").read_text())
    assert ModelSpec.from_dict(data["spec"]) == tiny_spec()
    assert data["plan"] == {name: value for name, value in written.items() if name != "spec"}


@pytest.mark.parametrize(
    ("gpu", "said"),
    [
        ("8.6", "yes"),
        ("7.5", "no: unet.plan is for compute capability 8.0 and later; this RTX has 7.5."),
        (None, "no: There is no NVIDIA GPU here, or no driver for it."),
    ],
)
def test_a_plan_runs_here_if_runtime_and_gpu_are_its_own(
    monkeypatch: pytest.MonkeyPatch, gpu: str | None, said: str
) -> None:
    here = Runtimes(versions={"tensorrt_rtx": "1.7.1.116"}, platform="Linux x86_64")
    found = gpu and Device(
        name="RTX", compute_capability=gpu, memory=1 << 33, integrated=False, driver="13.0"
    )
    monkeypatch.setattr(Runtimes, "here", lambda: here)
    monkeypatch.setattr(device_module, "find_device", lambda: found)
    plan = record(
        flavour="tensorrt_rtx",
        version="1.7.1.116",
        platform="Linux x86_64",
        device="",
        compute_capabilities=(),
    )
    write_plan(Path("unet.plan"), plan)
    assert rows("unet.plan")["runs here"] == said


@pytest.mark.parametrize("file", ["half.onnx", "unet.plan"])
def test_a_table_fits_80_columns(exported: Path, file: str) -> None:
    mixed = convert(onnx.load_model(exported / "unet.onnx"), "fp16")
    onnx.save_model(mixed.model, "half.onnx")
    write_plan(Path("unet.plan"), record(precision_groups=mixed.groups))
    assert max(map(len, run("inspect", file).out.splitlines())) <= 80


def test_an_observation_has_no_classes() -> None:
    observation = Condition(name="obs", meaning="observation", dtype="float32", shape=(7,))
    spec = replace(tiny_spec(classes=4), clip=None)
    write_graph(Path("policy.onnx"), spec)
    assert rows("policy.onnx")["x_0"] == "not clipped"
    from ddpm_deploy.cli.inspect import describe

    assert describe(observation) == "observation, float32 (7,)"


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("missing.onnx", "There is no file missing.onnx."),
        ("unet.plan", "There is no file unet.plan"),
        ("text.onnx", "text.onnx is no ONNX file: "),
        ("empty.onnx", "empty.onnx is no ONNX file: it holds no graph"),
        ("cut.plan", "cut.plan has 1,049 bytes; its sidecar says 1,050"),
        ("lone.plan", "lone.plan has no sidecar lone.plan.json"),
        ("unet.txt", "unet.txt is not an engine: its suffix is '.txt'"),
        ("text.pt", "text.pt is damaged, or is no checkpoint"),
        (".", ". is a folder without a model that this release knows"),
    ],
)
def test_what_says_nothing_is_one_message(folder: Path, file: str, message: str) -> None:
    Path("text.pt").write_text("text")
    Path("text.onnx").write_text("text")
    Path("empty.onnx").write_bytes(b"")
    write_plan(Path("cut.plan"), content=BYTES[:-1])
    Path("lone.plan").write_bytes(BYTES)
    before = contents(folder)
    assert message in refusal(run("inspect", file))
    assert contents(folder) == before
