from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.commands import Outcome, contents, refusal, run
from tests.support import tiny_spec, write_checkpoint, write_graph

QUICK = ["--steps", "3", "--repeat", "2", "--warm-up", "1", "--threads", "1"]

FIELDS = {
    "name",
    "batch",
    "steps",
    "median",
    "p90",
    "steps_per_second",
    "images_per_second",
    "overhead",
    "ratio",
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with engines in it, in which every command runs."""
    monkeypatch.chdir(tmp_path)
    write_graph(Path("unet.onnx"), tiny_spec())
    write_graph(Path("other.onnx"), tiny_spec())
    return tmp_path


def bench(*arguments: object) -> Outcome:
    return run("bench", *QUICK, *arguments)


def test_each_engine_has_its_figures() -> None:
    outcome = bench("-e", "unet.onnx", "-e", "other.onnx", "--batch", 2, "--json")
    assert outcome.code == 0, outcome
    report = json.loads(outcome.out)
    assert report["tool"].startswith("ddpm-deploy ")
    assert (report["threads"], report["machine"]["cores"] > 0) == (1, True)
    first, second = report["results"]
    assert [r["name"] for r in (first, second)] == [
        "onnxruntime CPU unet.onnx",
        "onnxruntime CPU other.onnx",
    ]
    for result in report["results"]:
        assert result.keys() == FIELDS
        assert (result["batch"], result["steps"]) == (2, 6)
        assert 0 < result["median"] <= result["p90"]
        assert result["steps_per_second"] == pytest.approx(1 / result["median"])
        assert result["images_per_second"] == pytest.approx(2 / (20 * result["median"]))
        assert 0 < result["overhead"] < 1
        assert result["ratio"] == first["median"] / result["median"]
    assert first["ratio"] == 1


def test_the_torch_loop_comes_first_and_the_ratios_are_to_it() -> None:
    write_checkpoint(Path("ckpt.pt"))
    outcome = bench("--against", "ckpt.pt", "--json")
    first, second = json.loads(outcome.out)["results"]
    assert (first["name"], second["name"]) == ("torch CPU loop", "onnxruntime CPU unet.onnx")
    assert (first["ratio"], first["overhead"]) == (1, 0)
    assert second["ratio"] == first["median"] / second["median"]


def test_the_table_has_the_columns_and_fits_80() -> None:
    outcome = bench("-e", "unet.onnx", "-e", "other.onnx")
    lines = outcome.out.splitlines()
    assert lines[0].rstrip() == "batch 1, 20 steps an image"
    for column in ("loop", "step ms", "p90", "steps/s", "images/s", "loop's own", "ratio"):
        assert column in lines[2]
    assert max(map(len, lines)) <= 80
    assert "e+" not in outcome.out
    assert outcome.err == "timing at batch 1: 2 x 2 turns of 3 steps\n"


def test_engines_of_one_file_name_are_kept_apart() -> None:
    for name in ("a", "b"):
        Path(name).mkdir()
        write_graph(Path(name, "unet.onnx"), tiny_spec())
    report = json.loads(bench("-e", "a/unet.onnx", "-e", "b/unet.onnx", "--json").out)
    assert [result["name"] for result in report["results"]] == [
        "onnxruntime CPU a/unet.onnx",
        "onnxruntime CPU b/unet.onnx",
    ]
    twice = json.loads(bench("-e", "a/unet.onnx", "-e", "a/unet.onnx", "--json").out)
    assert len(twice["results"]) == 1


def test_images_a_second_count_each_engine_s_own_steps() -> None:
    write_graph(Path("short.onnx"), tiny_spec(timesteps=5))
    outcome = bench("-e", "unet.onnx", "-e", "short.onnx", "--json")
    for result, rows in zip(json.loads(outcome.out)["results"], (20, 5), strict=True):
        assert result["images_per_second"] == pytest.approx(1 / (rows * result["median"]))
    table = bench("-e", "unet.onnx", "-e", "short.onnx").out
    assert table.startswith("batch 1, 20 or 5 steps an image")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-e", "missing.onnx"], "There is no file missing.onnx."),
        (["-e", "unet.plan"], "There is no file unet.plan"),
        (["--against", "other.onnx"], "other.onnx is no checkpoint, so it has no loop in PyTorch."),
        (["--against", "missing.pt"], "There is no file missing.pt."),
        (["--against", "ckpt.pt", "--device", "cuda"], "has no CUDA"),
        (["-e", "ckpt.pt", "--device", "cuda"], "finds no CUDA device."),
    ],
)
def test_what_cannot_be_is_one_message(folder: Path, arguments: list[str], message: str) -> None:
    write_checkpoint(Path("ckpt.pt"))
    before = contents(folder)
    assert message in refusal(bench(*arguments))
    assert contents(folder) == before


@pytest.mark.parametrize("option", ["--batch", "--steps", "--repeat", "--warm-up", "--threads"])
def test_nothing_to_time_is_wrong_usage(option: str) -> None:
    outcome = bench(option, 0)
    assert (outcome.code, outcome.out) == (2, "")
    assert option in outcome.err
