from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ddpm_deploy import Condition, ModelSpec
from ddpm_deploy.files import sha256
from tests.commands import contents, refusal, run
from tests.support import tiny_spec, write_checkpoint, write_graph


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a graph in it, in which every command runs."""
    monkeypatch.chdir(tmp_path)
    write_graph(Path("unet.onnx"), tiny_spec(classes=4))
    return tmp_path


def rows(file: str) -> dict[str, str]:
    """Returns the table of a file: its left column to its right."""
    outcome = run("inspect", file)
    assert outcome.code == 0, outcome
    assert all(line == line.rstrip() for line in outcome.out.splitlines())
    pairs = [line.split("  ", 1) for line in outcome.out.splitlines()]
    return {pair[0]: pair[1].strip() for pair in pairs}


def test_a_graph_says_what_it_is() -> None:
    said = rows("unet.onnx")
    assert said["file"] == "unet.onnx"
    assert said["sha256"] == sha256(Path("unet.onnx"))
    assert said["engine"] == "onnxruntime CPU"
    assert said["samples"] == "1 x 8 x 8, values -1 to 1"
    assert said["schedule"] == "linear (start 0.001, end 0.2), T = 20"
    assert said["predicts"] == "epsilon, variance fixed_small"
    assert said["x_0"] == "clipped to ±1"
    assert said["trained at"] == "t = 0 to 19"
    assert said["family"] == "test"
    assert said["checkpoint"] == "not recorded"
    assert said["condition y"] == "class_label, int64 (), 4 classes, 4 for none"


def test_a_checkpoint_says_the_same_as_its_graph() -> None:
    write_checkpoint(Path("ckpt.pt"), classes=4)
    graph, checkpoint = rows("unet.onnx"), rows("ckpt.pt")
    assert checkpoint["engine"] == "torch CPU"
    assert checkpoint["checkpoint"] == checkpoint["sha256"] == sha256(Path("ckpt.pt"))
    for name in graph.keys() - {"file", "sha256", "engine", "checkpoint"}:
        assert checkpoint[name] == graph[name]


def test_json_is_the_spec_and_reads_back() -> None:
    data = json.loads(run("inspect", "unet.onnx", "--json").out)
    assert (data["file"], data["engine"]) == ("unet.onnx", "onnxruntime CPU")
    assert data["fused"] is False
    for name in ("file", "sha256", "engine", "fused"):
        del data[name]
    assert ModelSpec.from_dict(data) == tiny_spec(classes=4)


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
        ("bare.onnx", "bare.onnx carries no ddpm-deploy spec"),
        ("text.pt", "text.pt is damaged, or is no checkpoint"),
        (".", ". is a folder; an engine is a file"),
    ],
)
def test_what_says_nothing_is_one_message(folder: Path, file: str, message: str) -> None:
    write_graph(Path("bare.onnx"), None)
    Path("text.pt").write_text("text")
    before = contents(folder)
    assert message in refusal(run("inspect", file))
    assert contents(folder) == before
