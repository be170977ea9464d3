from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from ddpm_deploy import open_engine
from ddpm_deploy.engines import build as build_module
from ddpm_deploy.engines.openvino import has_bf16
from ddpm_deploy.export import lower as lower_module
from ddpm_deploy.export.precision import recorded
from ddpm_deploy.run import batch_for
from tests.commands import Outcome, contents, refusal, run
from tests.support import tiny_spec, write_fused, write_graph


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a graph in it, in which every command runs."""
    monkeypatch.chdir(tmp_path)
    write_graph(Path("unet.onnx"), tiny_spec(classes=4))
    return tmp_path


def build(*arguments: object) -> Outcome:
    return run("build", *arguments)


def test_without_a_precision_the_engine_is_onnx_runtime_s_and_the_command_says_so() -> None:
    outcome = build()
    assert (outcome.code, outcome.out) == (0, "unet.ort.onnx\n")
    assert outcome.err.startswith("onnxruntime is fastest at batch ")
    assert "\nbuilt for onnxruntime 1." in outcome.err
    assert "CPU in float32 (for a TensorRT plan name its precision: --fp16): " in outcome.err
    assert ": the same as unet.onnx; " in outcome.err
    assert sorted(contents(Path())) == ["unet.onnx", "unet.ort.onnx"]


def test_the_engine_is_the_graph_and_samples() -> None:
    build("unet.onnx", "-o", "engines/fast.onnx")
    graph, engine = open_engine("unet.onnx"), open_engine("engines/fast.onnx")
    assert engine.spec == graph.spec
    x = np.random.default_rng(0).standard_normal((3, 1, 8, 8), dtype=np.float32)
    t, y = np.array([0, 5, 19]), np.array([0, 3, 4])
    np.testing.assert_allclose(engine(x, t, y=y), graph(x, t, y=y), atol=2e-5)
    assert run("sample", "-e", "engines/fast.onnx", "-n", 2).code == 0


def test_json_has_the_measurements() -> None:
    report = json.loads(build("--json").out)
    assert report["path"] == "unet.ort.onnx"
    assert report["runtime"].startswith("onnxruntime 1.")
    assert report["runtime"].endswith(" CPU")
    assert 0 <= report["deviation"] <= 2e-5
    for name in ("load_seconds", "graph_load_seconds", "seconds"):
        assert report[name] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bf16", "--runtime", "onnxruntime"], "ONNX Runtime has no convolution in bfloat16."),
        (["--budget", "1e-3"], "--budget and --data are for half precision"),
        (["--fp32", "--runtime", "rtx", "--data", "digits"], "--budget and --data are for half"),
        (["--fp16", "--runtime", "onnxruntime", "-o", "unet.onnx"], "would overwrite the graph"),
        (["--batch", "4"], "--batch is for a TensorRT plan."),
        (["--runtime", "openvino", "--fuse-step"], "OpenVINO's engine has no fused step"),
        (
            ["--runtime", "openvino", "--bf16", "--data", "digits"],
            "takes all of a network",
        ),
        (["--runtime", "auto", "--fp16"], "No runtime here computes in half precision on a CPU"),
        (["missing.onnx"], "There is no file missing.onnx."),
        (["notes.txt"], "notes.txt is no ONNX file: its suffix is '.txt'."),
        (["garbage.onnx"], "garbage.onnx cannot be read as an ONNX file"),
        (["bare.onnx"], "bare.onnx carries no ddpm-deploy spec"),
        (["-o", "unet.onnx"], "The engine would overwrite the graph it is built from, unet.onnx."),
        (["--device", "cuda"], "has no CUDA"),
        (["-o", "notes.txt/a.onnx"], "A file stands where a folder is needed: notes.txt."),
        (["-o", "new/dir.onnx/a.onnx", "bare.onnx"], "bare.onnx carries no ddpm-deploy spec"),
    ],
)
def test_what_cannot_be_is_one_message_and_leaves_nothing(
    folder: Path, arguments: list[str], message: str
) -> None:
    Path("notes.txt").write_text("notes")
    Path("garbage.onnx").write_bytes(b"garbage")
    write_graph(Path("bare.onnx"), None)
    before = contents(folder)
    assert message in refusal(build(*arguments))
    assert contents(folder) == before


def test_a_checkpoint_is_exported_first(folder: Path) -> None:
    Path("ckpt.pt").write_bytes(b"weights")
    before = contents(folder)
    outcome = build("ckpt.pt")
    assert refusal(outcome) == "ckpt.pt is a checkpoint; build takes the ONNX file made from it."
    assert " hint: Export it first: ddpm-deploy export ckpt.pt -o unet.onnx" in outcome.err
    assert contents(folder) == before


def test_wrong_usage_exits_with_2() -> None:
    outcome = build("-o", "engine.bin")
    assert (outcome.code, outcome.out) == (2, "")
    assert "engine.bin must end in .onnx" in outcome.err
    assert "'tflite' is none of auto, tensorrt, rtx" in build("--runtime", "tflite").err


@pytest.mark.parametrize("older", [True, False])
def test_an_engine_that_is_another_function_never_gets_its_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch, older: bool
) -> None:
    if older:
        Path("unet.ort.onnx").write_bytes(b"the older one")
    before = contents(folder)
    monkeypatch.setattr(build_module, "_errors", lambda *_: [3e-4])
    outcome = build()
    assert "The engine is not the graph it was built from: they differ by 3.0e-04" in refusal(
        outcome
    )
    assert contents(folder) == before


def test_a_folder_s_name_is_no_engine_s(folder: Path) -> None:
    Path("taken.onnx").mkdir()
    before = contents(folder)
    assert refusal(build("-o", "taken.onnx")) == "Is a directory: taken.onnx."
    assert contents(folder) == before


# --- The step fused behind the network ---


def test_a_fused_step_is_built_checked_and_named() -> None:
    outcome = build("--fuse-step", "-o", "fused.onnx")
    assert (outcome.code, outcome.out) == (0, "fused.onnx\n")
    assert "CPU in float32 with its step fused (for a TensorRT plan name its " in outcome.err
    assert open_engine("fused.onnx").fused
    assert json.loads(run("inspect", "fused.onnx", "--json").out)["fused"] is True
    assert "step         fused behind the network\n" in run("inspect", "fused.onnx").out
    assert sorted(contents(Path())) == ["fused.onnx", "unet.onnx"]


def test_a_fused_engine_serves_every_command() -> None:
    build("--fuse-step", "-o", "fused.onnx")
    for engine in ("fused", "unet"):
        outcome = run(
            "sample", "-e", f"{engine}.onnx", "-n", 3, "-o", engine, "--gif", "--batch", 2
        )
        assert outcome.code == 0, outcome
    drawn = {name: file for name, file in contents(Path("fused")).items() if name != "run.json"}
    assert drawn.items() <= contents(Path("unet")).items()
    assert len(drawn) == 5  # three images, the grid and the GIF
    verified = run("verify", "-e", "fused.onnx", "--against", "unet.onnx", "--steps", 5)
    assert verified.code == 0, verified
    timed = run(
        "bench", "-e", "unet.onnx", "-e", "fused.onnx", "--steps", 2, "--repeat", 1, "--json"
    )
    assert len(json.loads(timed.out)["results"]) == 2


def test_a_fused_engine_can_be_built_again() -> None:
    build("--fuse-step", "-o", "fused.onnx")
    assert build("fused.onnx", "-o", "again.onnx", "--fuse-step").code == 0
    assert build("fused.onnx", "-o", "kept.onnx").code == 0
    refused = refusal(build("kept.onnx", "--runtime", "openvino"))
    assert refused == "kept.onnx is an engine already, for onnxruntime."
    assert open_engine("again.onnx").fused
    assert open_engine("kept.onnx").fused


@pytest.mark.parametrize(
    ("operator", "by"),
    [("Sub", ""), ("Pow", "nan of the peak")],  # a negative number has no such powers
)
def test_a_fused_step_that_is_another_never_gets_its_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch, operator: str, by: str
) -> None:
    model = onnx.load_model(write_fused(Path("wrong.onnx"), tiny_spec(classes=4)))
    (add,) = (node for node in model.graph.node if list(node.output) == ["x_s"])
    add.op_type = operator
    before = contents(folder)
    monkeypatch.setattr(lower_module, "fuse_step", lambda _: model)
    message = refusal(build("--fuse-step", "-o", "fused.onnx"))
    assert message.startswith(f"The engine is not the graph it was built from: they differ by {by}")
    assert contents(folder) == before


def test_half_precision_for_onnx_runtime_is_the_mixed_graph_itself(exported: Path) -> None:
    outcome = build(exported / "unet.onnx", "--fp16", "--runtime", "onnxruntime", "-o", "half.onnx")
    assert (outcome.code, outcome.out) == (0, "half.onnx\n"), outcome
    assert " of its peak from float32's" in outcome.err
    assert "ddpm-deploy build half.onnx --fp16" in outcome.err
    mixed = recorded(onnx.load_model("half.onnx"))
    assert mixed is not None
    assert mixed.error is not None
    with open_engine("half.onnx") as engine:
        assert engine.precision == "fp16"
    against = ("--against", exported / "unet.onnx")
    assert run("verify", "-e", "half.onnx", *against).code == 0
    fused = ("--fuse-step", "-o", "fused.onnx")
    assert build(exported / "unet.onnx", "--fp16", "--runtime", "onnxruntime", *fused).code == 0
    with open_engine("fused.onnx") as engine:
        assert (engine.fused, engine.precision) == (True, "fp16")


def test_half_precision_is_measured_on_pictures(exported: Path) -> None:
    mixed = ("--fp16", "--runtime", "onnxruntime", "-o", "half.onnx")
    outcome = build(exported / "unet.onnx", *mixed, "--data", "digits", "--json")
    assert outcome.code == 0, outcome
    on_pictures = json.loads(outcome.out)["error"]
    on_samples = json.loads(build(exported / "unet.onnx", *mixed, "--json").out)["error"]
    assert 0 < on_pictures < 5e-3
    assert on_pictures != on_samples
    refused = build(exported / "unet.onnx", *mixed, "--data", "nothing")
    assert refusal(refused) == "There is no folder or file nothing."


def test_a_budget_that_half_precision_cannot_keep_is_refused(exported: Path) -> None:
    mixed = ("--fp16", "--runtime", "onnxruntime", "-o", "half.onnx")
    outcome = build(exported / "unet.onnx", *mixed, "--budget", "1e-9")
    assert outcome.code == 2
    assert "error: In fp16 the network's output is " in outcome.err
    assert "the budget is 1e-09." in outcome.err
    assert not Path("half.onnx").exists()


# --- Runtimes for a CPU ---


def test_openvino_s_engine_is_the_graph_and_samples() -> None:
    outcome = build("--runtime", "openvino")
    assert (outcome.code, outcome.out) == (0, "unet.ov.onnx\n")
    assert "\nbuilt for openvino 20" in outcome.err
    assert sorted(contents(Path())) == ["unet.onnx", "unet.ov.onnx"]
    assert run("sample", "-e", "unet.ov.onnx", "-n", 3, "-o", "a").code == 0
    assert run("sample", "-e", "unet.onnx", "-n", 3, "-o", "b").code == 0
    images = [{n: f for n, f in contents(Path(o)).items() if n != "run.json"} for o in "ab"]
    assert images[0] == images[1]


@pytest.mark.parametrize(("runtime", "name"), [("onnxruntime", "ort"), ("openvino", "ov")])
def test_a_build_measures_the_best_batch_and_sample_takes_it(runtime: str, name: str) -> None:
    build("--runtime", runtime)
    with open_engine(f"unet.{name}.onnx") as engine:
        assert engine.best_batch in {1, 2, 4, 8, 16, 32, 64}
        assert batch_for(engine) == engine.best_batch
    told = run("inspect", f"unet.{name}.onnx").out
    assert f"\nbest batch   {engine.best_batch}\n" in told
    assert "\nbuilt for    " in told
    assert json.loads(run("inspect", f"unet.{name}.onnx", "--json").out)["runtime"]


def test_auto_measures_what_is_installed_and_remembers() -> None:
    outcome = build("--runtime", "auto")
    assert (outcome.code, outcome.out) == (0, "unet.cpu.onnx\n")
    assert "building and measuring for onnxruntime" in outcome.err
    assert " is the fastest here: onnxruntime " in outcome.err
    before = contents(Path())
    again = build("--runtime", "auto")
    assert (again.code, again.out) == (0, "unet.cpu.onnx\n")
    assert again.err.startswith("measured here before for unet.onnx: onnxruntime ")
    assert contents(Path()) == before
    record = json.loads(build("--runtime", "auto", "--json").out)["record"]
    assert record["milliseconds"].keys() == {"onnxruntime", "openvino"}
    named = build("--runtime", "onnxruntime", "-o", "unet.cpu.onnx")
    assert named.code == 0
    assert "building and measuring" in build("--runtime", "auto").err, "it was not measured"
    if has_bf16():
        other = build("--runtime", "auto", "--bf16", "-o", "unet.cpu.onnx")
        assert "measured here before" not in other.err
        assert open_engine("unet.cpu.onnx").precision == "bf16"
    build("--runtime", "auto")
    write_graph(Path("unet.onnx"), tiny_spec(classes=4), bias=0.5)
    assert "building and measuring for openvino" in build("--runtime", "auto").err
    assert "building and measuring" in build("--runtime", "auto", "--force").err


@pytest.mark.skipif(not has_bf16(), reason="this processor has no bfloat16")
def test_a_budget_in_bfloat16_is_kept_or_refused() -> None:
    before = contents(Path())
    refused = refusal(build("--bf16", "--runtime", "openvino", "--budget", "1e-9"))
    assert "of the peak; at most 1e-09 is allowed. Nothing was written." in refused
    assert contents(Path()) == before
    outcome = build("--bf16", "--runtime", "openvino")
    assert (outcome.code, outcome.out) == (0, "unet.bf16.ov.onnx\n")
    with open_engine("unet.bf16.ov.onnx") as engine:
        assert engine.precision == "bf16"
