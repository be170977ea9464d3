from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from ddpm_deploy import linear
from ddpm_deploy.export.precision import convert
from ddpm_deploy.export.rounding import rounded
from tests.commands import Outcome, contents, refusal, run
from tests.support import tiny_spec, write_checkpoint, write_graph, write_state_dict


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model and the same again, in which every command runs."""
    monkeypatch.chdir(tmp_path)
    write_graph(Path("unet.onnx"), tiny_spec())
    write_graph(Path("same.onnx"), tiny_spec())
    return tmp_path


def verify(*arguments: object) -> Outcome:
    # One thread: the threads of two runtimes get in each other's way where cores are few.
    return run("verify", "--threads", 1, *arguments)


def failures(*arguments: object) -> list[str]:
    """Runs a comparison that must fail; returns its reasons."""
    outcome = verify(*arguments)
    assert outcome.code == 1, outcome
    *_, last = outcome.out.splitlines()
    assert last == "verdict: NOT the same model"
    lines = [line for line in outcome.out.splitlines() if line.startswith("outside: ")]
    return [line.removeprefix("outside: ") for line in lines]


def worst(report: dict[str, Any]) -> float:
    """Returns the largest local error of the output."""
    return float(max(step["local"]["out"]["max"] for step in report["steps"]))


def bounds(report: dict[str, Any]) -> dict[str, float]:
    """Returns what was allowed, by the check's name."""
    return {c["name"]: c["bound"] for c in report["checks"] if c["bound"] is not None}


def test_an_exported_network_is_the_trained_one_over_its_whole_loop(exported: Path) -> None:
    outcome = verify("-e", exported / "unet.onnx", "--against", exported / "ckpt.pt", "--json")
    assert outcome.code == 0, outcome
    report = json.loads(outcome.out)
    assert (report["passed"], report["failures"], report["same_checkpoint"]) == (True, [], True)
    assert [step["t"] for step in report["steps"]] == list(range(19, -1, -1))
    assert report["engine"]["name"] == "onnxruntime CPU"
    assert report["reference"]["name"] == "torch CPU"
    assert 0 < worst(report) < 2e-5


def test_half_precision_has_a_budget_of_its_own(exported: Path) -> None:
    mixed = convert(onnx.load(exported / "unet.onnx"), "fp16").model
    onnx.save_model(rounded(mixed), "half.onnx")
    against = ("-e", "half.onnx", "--against", exported / "ckpt.pt")
    outcome = verify(*against, "--json")
    assert outcome.code == 0, outcome
    report = json.loads(outcome.out)
    limits = {"local/out/max": 5e-3, "local/x/max": 5e-3, "accumulated/x/max": 1e-2}
    assert bounds(report) == {**limits, "pixels": 0.99, "bias": 0.1}
    assert 2e-5 < worst(report) < 5e-3
    assert "local error" in failures(*against, "--local", 2e-5)[0]


def test_a_checkpoint_of_other_weights_is_another_model(exported: Path) -> None:
    write_checkpoint(Path("other.pt"), classes=3, seed=1)
    outcome = verify("-e", exported / "unet.onnx", "--against", "other.pt")
    assert outcome.code == 1
    assert "outside: local error of the output" in outcome.out
    assert "note: the engine was exported from another checkpoint file" in outcome.out


@pytest.mark.parametrize("classes", [0, 5])
def test_a_checkpoint_of_another_kind_cannot_be_compared(exported: Path, classes: int) -> None:
    write_state_dict(Path("bare.pt"), channels=1, classes=classes)
    message = refusal(verify("-e", exported / "unet.onnx", "--against", "bare.pt"))
    assert message.startswith("bare.pt is a network of 1 channels and ")
    assert message.endswith("; the engine beside it has 1 channels and 3 labels of test.")


def test_the_same_model_passes_with_a_table_and_a_verdict() -> None:
    outcome = verify("-e", "unet.onnx", "--against", "same.onnx")
    assert outcome.code == 0
    assert "onnxruntime CPU against onnxruntime CPU, 4 images, all 20 timesteps" in outcome.out
    assert "ok: local error of the output: max 0 at t = 19" in outcome.out
    assert "ok: accumulated error of x: max 0 at t = 19" in outcome.out
    assert "images: 100.000% of pixels equal" in outcome.out
    assert outcome.out.endswith("verdict: the same model\n")
    rows = [line for line in outcome.out.splitlines() if "0.0e+00 │" in line]
    assert len(rows) == 12
    assert all(len(line) <= 80 for line in outcome.out.splitlines())


def test_the_report_is_the_same_on_stdout_and_in_a_file() -> None:
    outcome = verify("-e", "unet.onnx", "--against", "same.onnx", "-o", "report.json", "--json")
    report: dict[str, Any] = json.loads(outcome.out)
    assert json.loads(Path("report.json").read_text()) == report
    assert "report: report.json" in outcome.err
    assert report.keys() == {
        "tool", "passed", "failures", "causes", "engine", "reference", "same_checkpoint", "recipe",
        "images", "sampled", "seconds", "command", "bisection", "checks", "budget", "not_finite",
        "amplification", "pictures", "steps",
    }  # fmt: skip
    assert report["engine"]["path"] == "unet.onnx"
    assert report["engine"]["sha256"] == report["reference"]["sha256"]
    assert report["same_checkpoint"] is None  # neither says where it came from
    limits = {"local/out/max": 2e-5, "local/x/max": 2e-5, "accumulated/x/max": 1e-3}
    assert bounds(report) == {**limits, "pixels": 0.999, "equal": 0.99, "bias": 0.1}
    none = {"max": 0, "l2": 0, "cosine": 1, "psnr": None}
    parts = {"out": none, "x0": none, "x": none}
    assert report["steps"][0] == {"k": 1, "t": 19, "local": parts, "accumulated": parts}
    assert report["pictures"]["psnr"] == [None] * 4


def test_other_weights_fail_by_name() -> None:
    write_graph(Path("other.onnx"), tiny_spec(), bias=0.05)
    reasons = failures("-e", "other.onnx", "--against", "unet.onnx")
    assert reasons[0].startswith("local error ")
    assert reasons[1].startswith("local error of x: ")
    assert reasons[2].startswith("accumulated error ")
    assert "of pixels are within one level" in reasons[3]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"schedule": linear(20, start=1e-3, end=0.1)},
            "the specs differ in schedule: linear (start 0.001, end 0.2), T = 20 in the reference, "
            "linear (start 0.001, end 0.1), T = 20 in the engine",
        ),
        ({"clip": None}, "the specs differ in clip: 1.0 in the reference, None in the engine"),
        (
            {"variance": "fixed_large"},
            "the specs differ in variance: fixed_small in the reference, fixed_large in the engine",
        ),
    ],
)
def test_another_spec_fails_by_name_though_the_network_is_the_same(
    changes: dict[str, Any], reason: str
) -> None:
    write_graph(Path("other.onnx"), replace(tiny_spec(), **changes))
    # Each side follows the table of its own spec, so that what it does to the loop shows too.
    assert failures("-e", "other.onnx", "--against", "unet.onnx")[0] == reason


def test_numbers_that_are_not_finite_fail_by_timestep_and_stay_json() -> None:
    # log(t - 6.5) is no number from t = 6 on.
    write_logarithm(Path("nan.onnx"))
    reasons = failures("-e", "nan.onnx", "--against", "unet.onnx")
    assert reasons == ["numbers are not finite from t = 6 (step 14) on"]
    report = json.loads(
        verify("-e", "nan.onnx", "--against", "unet.onnx", "--json").out,
        parse_constant=lambda name: pytest.fail(f"{name} is no JSON"),
    )
    assert report["not_finite"] == {"k": 14, "t": 6, "where": "local"}
    assert report["passed"] is False
    assert [step["t"] for step in report["steps"]] == list(range(19, 6, -1))


def write_logarithm(path: Path) -> None:
    """Writes the usual graph plus 0·log(t - 6.5)."""
    model = onnx.load_model(write_graph(path, tiny_spec()))
    graph = model.graph
    for name, value in (("offset", 6.5), ("nothing", 0.0)):
        graph.initializer.append(numpy_helper.from_array(np.array(value, dtype=np.float32), name))
    last = graph.node[-1]
    last.output[0] = "before"
    graph.node.extend(
        [
            helper.make_node("Sub", ["tf", "offset"], ["left"]),
            helper.make_node("Log", ["left"], ["log"]),
            helper.make_node("Mul", ["log", "nothing"], ["zero"]),
            helper.make_node("Reshape", ["zero", "column"], ["zero4"]),
            helper.make_node("Add", ["before", "zero4"], ["out"]),
        ]
    )
    onnx.save_model(model, path)


def test_labels_and_guidance_reach_both_networks() -> None:
    write_graph(Path("a.onnx"), tiny_spec(classes=4))
    write_graph(Path("b.onnx"), tiny_spec(classes=4))
    outcome = verify(
        "-e", "a.onnx", "--against", "b.onnx", "--label", "2,4", "--guidance", 3, "--json"
    )
    report = json.loads(outcome.out)
    assert (report["recipe"]["labels"], report["recipe"]["guidance"]) == ([2, 4], 3.0)
    assert report["passed"] is True


def test_the_sampler_s_settings_decide_the_loop() -> None:
    arguments = ["-e", "unet.onnx", "--against", "same.onnx", "--sampler", "ddim"]
    report = json.loads(verify(*arguments, "--steps", 4, "--eta", 0.5, "-n", 1, "--json").out)
    assert [step["t"] for step in report["steps"]] == [15, 10, 5, 0]
    assert (report["recipe"]["sampler"], report["images"]) == ("ddim", [0])
    assert len(report["pictures"]["psnr"]) == 1


def test_a_budget_can_be_given() -> None:
    write_graph(Path("near.onnx"), tiny_spec(), bias=1e-4)
    arguments = ["-e", "near.onnx", "--against", "unet.onnx"]
    assert verify(*arguments).code == 1
    assert verify(*arguments, "--local", 1e-3, "--accumulated", 1e-2, "--pixels", 0.9).code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against", "missing.pt"], "There is no file missing.pt."),
        (["-e", "missing.onnx", "--against", "same.onnx"], "There is no file missing.onnx."),
        (["--against", "larger.onnx"], "makes samples of (1, 16, 16), unet.onnx of (1, 8, 8)."),
        (["--against", "same.onnx", "--steps", "21"], "Steps is 21; this schedule has 1 to 20."),
        (["--against", "same.onnx", "--sampler", "euler"], "Sampler is 'euler'; there are ddpm"),
        (["--against", "same.onnx", "--label", "1"], "is unconditional: it takes neither labels"),
        (["--against", "same.onnx", "--device", "cuda"], "has no CUDA"),
        (["--against", "nan.onnx"], "The reference itself gives numbers that are not finite"),
        (["--against", "same.onnx", "-o", "unet.onnx/report.json"], "A file stands where a folder"),
        (["--against", "same.onnx", "-o", "."], "Is a directory: ."),
    ],
)
def test_what_cannot_be_compared_is_one_message_and_leaves_nothing(
    folder: Path, arguments: list[str], message: str
) -> None:
    write_graph(Path("larger.onnx"), tiny_spec(size=16))
    write_graph(Path("nan.onnx"), tiny_spec(), bias=float("nan"))
    before = contents(folder)
    assert message in refusal(verify(*arguments))
    assert contents(folder) == before


def test_a_report_to_a_full_device_is_an_error_and_the_device_stays() -> None:
    assert refusal(verify("--against", "same.onnx", "-o", "/dev/full")) == (
        "No space left on device."
    )
    assert Path("/dev/full").is_char_device()


@pytest.mark.parametrize(
    "arguments", [["-n", "0"], ["-n", "x"], ["--steps", "0"], ["--seed", "-1"]]
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    outcome = verify("--against", "same.onnx", *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("Usage: ")


def test_some_timesteps_are_compared_with_a_stated_confidence(exported: Path) -> None:
    against = ("--against", exported / "ckpt.pt")
    outcome = verify("-e", exported / "unet.onnx", *against, "--timesteps", 8, "--json")
    assert outcome.code == 0, outcome
    report = json.loads(outcome.out)
    assert report["steps"][0]["t"] == 19
    assert len(report["steps"]) == 8
    assert report["sampled"].pop("share") == pytest.approx(1 - 0.05 ** (1 / 7))
    assert report["sampled"] == {"seen": 8, "of": 20, "drawn": True, "recorded": False}
    again = json.loads(
        verify("-e", exported / "unet.onnx", *against, "--timesteps", 8, "--json").out
    )
    assert again["steps"] == report["steps"]
    both = verify("-e", "unet.onnx", "--against", "same.onnx", "--timesteps", 8, "--steps", 4)
    assert both.code == 2
    assert "it draws the timesteps that --steps would choose" in " ".join(both.err.split())


def test_a_trace_takes_the_place_of_the_checkpoint(exported: Path) -> None:
    assert run("trace", exported / "ckpt.pt", "-o", "ckpt.trace", "--threads", 1).code == 0
    outcome = verify("-e", exported / "unet.onnx", "--against", "ckpt.trace")
    assert outcome.code == 0, outcome
    assert "onnxruntime CPU against torch CPU" in outcome.out
    for option in (("--steps", 4), ("--seed", 1), ("-n", 2), ("--timesteps", 4)):
        refused = verify("-e", exported / "unet.onnx", "--against", "ckpt.trace", *option)
        assert refused.code == 2
        assert "ckpt.trace says what loop it is" in " ".join(refused.err.split())


@pytest.mark.parametrize(
    ("suffix", "begins"), [("html", "<!doctype html>"), ("xml", "<?xml"), ("sarif", "{")]
)
def test_a_report_takes_the_form_of_its_suffix(suffix: str, begins: str) -> None:
    report = Path(f"out/report.{suffix}")
    outcome = verify("-e", "unet.onnx", "--against", "same.onnx", "-o", report, "-o", "a.json")
    assert outcome.code == 0, outcome
    assert report.read_text(encoding="utf-8").lower().startswith(begins)
    assert json.loads(Path("a.json").read_text())["passed"] is True
    assert f"report: {report}" in outcome.err


def test_a_report_of_no_known_form_is_refused_before_the_loop() -> None:
    outcome = verify("-e", "unet.onnx", "--against", "same.onnx", "-o", "report.pdf")
    assert outcome.code == 2
    assert "reports end in .json, .html, .xml, .sarif" in " ".join(outcome.err.split())
    assert not Path("report.pdf").exists()


def test_a_report_that_is_named_twice_is_refused_before_the_loop() -> None:
    write_graph(Path("unet.onnx"), tiny_spec())
    outcome = run("verify", "--against", "unet.onnx", "-o", "report.json", "-o", "./report.json")
    assert outcome.code == 2
    assert "report.json is named twice" in outcome.err.replace("\n", "")
    assert not Path("report.json").exists()


def test_a_budget_is_a_file_or_a_name() -> None:
    write_graph(Path("near.onnx"), tiny_spec(), bias=1e-4)
    arguments = ["-e", "near.onnx", "--against", "unet.onnx", "--budget"]
    assert verify(*arguments, "fp32").code == 1
    assert verify(*arguments, "fp16").code == 0
    Path("mine.toml").write_text(
        'pixels = 0.5\n[[limit]]\nerror = "local"\nquantity = "out"\nat_most = 1e-5\n'
        'from = 10\n[[limit]]\nerror = "local"\nquantity = "out"\nat_most = 1e-2\nto = 9\n'
    )
    reasons = failures(*arguments, "mine.toml")
    assert len(reasons) == 1
    assert reasons[0].startswith("local error of the output: max ")
    assert refusal(verify(*arguments, "none.toml")) == "There is no budget none.toml."
    Path("bad.toml").write_text("pixels = 'all'")
    assert refusal(verify(*arguments, "bad.toml")) == (
        "bad.toml is no budget: pixels is 'all'; it is a number from 0 to 1."
    )


def test_without_onnx_the_cause_is_what_the_numbers_say(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    write_graph(Path("other.onnx"), tiny_spec(), bias=0.05)
    for name in [n for n in sys.modules if n.startswith("ddpm_deploy.export")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnx", None)
    outcome = verify("-e", "other.onnx", "--against", "unet.onnx")
    assert outcome.code == 1
    assert "likely cause: The network computes another function" in outcome.out
    message = refusal(verify("-e", "other.onnx", "--against", "unet.onnx", "--bisect"))
    assert "onnx is needed here" in message
