from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from ddpm_deploy.export.precision import convert
from ddpm_deploy.files import sha256
from ddpm_deploy.verify import read_budget
from tests.commands import Outcome, contents, refusal, run


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in which every command runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def budget(*arguments: object) -> Outcome:
    return run("budget", "--threads", 1, *arguments)


def test_it_says_what_each_precision_should_give(exported: Path) -> None:
    outcome = budget(exported / "ckpt.pt")
    assert outcome.code == 0, outcome
    rows = [line.split("│")[1].strip() for line in outcome.out.splitlines() if "│" in line]
    assert rows == ["fp32", "tf32", "fp16", "bf16", "int8"]
    assert "amplification from local to accumulated x: " in outcome.out
    assert "to keep the budget of one" in outcome.err


@pytest.mark.parametrize("name", ["ckpt.pt", "unet.onnx"])
def test_the_file_is_a_budget_that_says_where_it_comes_from(exported: Path, name: str) -> None:
    outcome = budget(exported / name, "--precision", "fp16", "-n", 2, "-o", "budget.toml")
    assert outcome.code == 0, outcome
    text = Path("budget.toml").read_text(encoding="utf-8")
    assert text.startswith("# What a loop in fp16 may differ by.")
    assert f"# network: {name}, SHA-256 {sha256(exported / name)}" in text
    assert "# loop: seed 0, sampler ddpm, eta 0.0, spacing leading, guidance 1.0; 2 images" in text
    assert "# allowed: 4 times what is expected" in text
    read = read_budget(Path("budget.toml"))
    assert {(limit.error, limit.quantity) for limit in read.limits} == {
        ("local", "out"),
        ("local", "x0"),
        ("local", "x"),
        ("accumulated", "x0"),
        ("accumulated", "x"),
    }
    assert read.limits[0].first == 0


def test_json_has_the_budget_and_all_that_is_expected(exported: Path) -> None:
    outcome = budget(exported / "ckpt.pt", "--precision", "bf16", "--json", "-o", "budget.toml")
    said = json.loads(outcome.out)
    assert said["precision"] == "bf16"
    assert said["budget"] == read_budget(Path("budget.toml")).to_dict()
    expected = said["expected"]
    assert list(expected) == ["fp32", "tf32", "fp16", "bf16", "int8"]
    assert expected["bf16"]["ranges"][0]["from"] == 0
    assert expected["bf16"]["ranges"][-1]["to"] == 19


def test_a_larger_factor_allows_more(exported: Path) -> None:
    bounds = []
    for factor in (2, 8):
        said = json.loads(budget(exported / "ckpt.pt", "--factor", factor, "--json").out)
        bounds.append([limit["at_most"] for limit in said["budget"]["limit"]])
    assert all(large >= small for small, large in zip(*bounds, strict=True))
    assert bounds[0] != bounds[1]


def test_some_timesteps_are_a_quick_look(exported: Path) -> None:
    outcome = budget(exported / "ckpt.pt", "--timesteps", 5, "-o", "budget.toml")
    assert outcome.code == 0, outcome
    assert "5 timesteps, drawn over the schedule" in Path("budget.toml").read_text("utf-8")
    assert "5 steps in " in outcome.err


def test_a_network_in_half_precision_is_no_measure(exported: Path) -> None:
    onnx.save_model(convert(onnx.load(exported / "unet.onnx"), "fp16").model, "half.onnx")
    before = contents(Path())
    outcome = budget("half.onnx", "-o", "budget.toml")
    assert refusal(outcome).startswith("half.onnx computes in fp16")
    assert "hint: Give the checkpoint" in outcome.err
    assert contents(Path()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--precision", "fp8"), "'fp8' is none of fp32, tf32, fp16, bf16, int8"),
        (("--factor", "0.5"), "0.5 is not at least 1 and finite"),
        (("--factor", "nan"), "nan is not at least 1 and finite"),
        (("--timesteps", "5", "--steps", "5"), "it and --steps both choose timesteps"),
    ],
)
def test_wrong_options_are_named(exported: Path, arguments: tuple[str, ...], message: str) -> None:
    outcome = budget(exported / "ckpt.pt", *arguments, "-o", "budget.toml")
    assert outcome.code == 2
    assert message in " ".join(outcome.err.replace("│", " ").split())
    assert not Path("budget.toml").exists()
