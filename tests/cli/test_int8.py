"""`build --int8`: a graph that every runtime takes, within a budget in decibels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from ddpm_deploy import open_engine
from ddpm_deploy.engines.flavour import installed
from ddpm_deploy.engines.openvino import OpenVinoEngine
from ddpm_deploy.engines.plan import read_record
from ddpm_deploy.export.qdq import int8_products
from ddpm_deploy.precision import METADATA_KEY, read_precision
from ddpm_deploy.runtime import RuntimeRecord
from tests.commands import Outcome, contents, refusal, run
from tests.export.test_quantize import write

rtx = pytest.mark.skipif(
    "tensorrt_rtx" not in installed(), reason="tensorrt_rtx is not installed: no plan can be built"
)
MADE = Path("unet.int8.onnx")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a graph of five convolutions in it, in which every command runs."""
    monkeypatch.chdir(tmp_path)
    write(Path("unet.onnx"))
    return tmp_path


def build(*arguments: object) -> Outcome:
    return run("build", "unet.onnx", "--int8", *arguments)


def test_the_graph_is_written_with_what_it_keeps_and_runs() -> None:
    outcome = build("--budget", "psnr=40")
    assert (outcome.code, outcome.out) == (0, "unet.int8.onnx\n")
    assert "; 40 are asked for\n" in outcome.err
    assert "its loop's worst image is " in outcome.err
    said = {e.key: e.value for e in onnx.load(MADE).metadata_props}
    loop = read_precision(said[METADATA_KEY], source="g").loop
    assert loop is not None
    assert loop.psnr >= loop.budget == 40
    assert run("sample", "-e", MADE, "-n", 2, "--steps", 3).code == 0
    told = " ".join(run("inspect", MADE).out.split())
    assert "precision int8" in told
    assert "in int8 3 Conv" in told
    assert "dB from float32 at the worst of 2 images" in told
    shown = json.loads(run("inspect", MADE, "--json").out)
    assert shown["precision_loop"]["budget"] == 40


def test_json_has_what_was_measured() -> None:
    shown = json.loads(build("--json", "-o", "a.onnx").out)
    assert shown["path"] == "a.onnx"
    assert shown["psnr"] > 30
    assert shown["floats"] == {}
    assert 0 < shown["error"] < 0.3


def test_openvino_takes_the_graph_and_computes_it_in_int8() -> None:
    build()
    record = RuntimeRecord(runtime="openvino", precision="int8")
    x = np.random.default_rng(0).standard_normal((2, 1, 8, 8)).astype(np.float32)
    t = np.array([3, 9])
    with open_engine(MADE) as same:
        wanted = same(x, t)
    engine = OpenVinoEngine(MADE, record=record, threads=1)
    assert np.abs(engine(x, t) - wanted).max() < 0.02 * np.abs(wanted).max()
    kernels = [kind for kind, _ in engine.layer_times(2, calls=1).values()]
    assert sum("Convolution" in kind and "i8" in kind for kind in kernels) == 3


def test_a_runtime_s_engine_is_built_of_the_graph() -> None:
    outcome = build("--runtime", "openvino", "--threads", 1)
    assert (outcome.code, outcome.out) == (0, "unet.int8.ov.onnx\n")
    with open_engine("unet.int8.ov.onnx", threads=1) as engine:
        assert engine.precision == "int8"
        assert engine.name.startswith("openvino")


@rtx
def test_tensorrt_rtx_builds_a_plan_of_the_graph() -> None:
    made = build("--runtime", "rtx", "--budget", "psnr=35", "-o", "a.plan", "--keep-graph")
    assert (made.code, made.out) == (0, "a.plan\n"), made
    record = read_record(Path("a.plan"))
    assert record.precision == "int8"
    assert record.precision_groups["int8"] == "3 Conv"
    assert record.layers["QUANTIZE INT8"] == 3
    assert "--int8 --runtime rtx --budget psnr=35" in run("inspect", "a.plan").out
    assert int8_products(onnx.load(MADE)) == ["b", "c", "d"]
    again = run("build", MADE, "--int8", "--runtime", "rtx", "-o", "b.plan")
    assert again.code == 0, again
    assert "taking the ranges" not in again.err  # as it is
    assert read_record(Path("b.plan")).precision_groups == record.precision_groups


def test_a_fused_step_stands_behind_it() -> None:
    assert build("--fuse-step").code == 0
    with open_engine(MADE) as engine:
        assert (engine.fused, engine.precision) == (True, "int8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "psnr=500"], "the budget is 500 dB"),
        (["-o", "unet.onnx"], "would overwrite the graph it is built from"),
        (["--fp16"], "--fp16 and --int8 are given"),
        (["--batch", "4"], "--batch is for a TensorRT plan."),
    ],
)
def test_what_cannot_be_is_one_message_and_leaves_nothing(
    folder: Path, arguments: list[str], message: str
) -> None:
    before = contents(folder)
    assert message in refusal(build(*arguments))
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--int8", "--budget", "0.01"], "the budget of int8 is psnr=35, in decibels"),
        (["--fp16", "--budget", "psnr=30"], "the budget of fp16 is a number, such as 5e-3"),
        (["--int8", "--budget", "psnr=high"], "'psnr=high' is no number"),
        (["--int8", "--budget", "psnr=inf"], "psnr=inf is not finite"),
        (["--fp16", "--budget", "-1"], "-1 is below 0"),
        (["--int8", "-o", "engine.bin"], "engine.bin must end in .onnx"),
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], message: str) -> None:
    outcome = run("build", "unet.onnx", *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in " ".join(outcome.err.replace("│", " ").split())


# --- What must not be lost, and what is checked before the work ---


def test_the_graph_is_never_overwritten(folder: Path) -> None:
    before = contents(folder)
    for runtime in ("openvino", "auto", "onnxruntime"):
        outcome = run("build", "unet.onnx", "--int8", "--runtime", runtime, "-o", "unet.onnx")
        assert "would overwrite the graph it is built from" in refusal(outcome)
    for extra in (["--fuse-step"], ["--device", "cuda"], ["-o", "unet.int8.onnx"]):
        refusal(run("build", "unet.onnx", "--int8", "--runtime", "openvino", *extra))
    assert contents(folder) == before
