"""The demo's network is what its page says, and can be read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ddpm_deploy.files import sha256
from ddpm_deploy.model import load_network

DEMO = Path(__file__).parents[1] / "demo"
pytest.importorskip("sklearn", reason="the demo's digits are scikit-learn's")


def check_digits(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(DEMO / "check_digits.py"), "-n", "40", "--steps", "20", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_demos_checkpoint_is_the_one_that_its_page_describes() -> None:
    path = DEMO / "digits.pt"
    page = (DEMO / "README.md").read_text(encoding="utf-8")
    assert path.stat().st_size <= 2_000_000
    assert sha256(path) in page
    loaded = load_network(path)
    assert loaded.spec.sample_shape == (1, 8, 8)
    assert loaded.spec.label is not None
    assert loaded.spec.label.classes == 10
    assert loaded.spec.schedule.T == 1000
    assert f"{sum(p.numel() for p in loaded.network.parameters()):,} parameters" in page


def test_a_classifier_reads_digits_drawn_in_twenty_steps() -> None:
    result = check_digits()
    assert result.returncode == 0, result.stderr
    assert "of 40 digits are read as their label (ddpm, 20 steps" in result.stdout


@pytest.mark.slow
def test_a_classifier_reads_nine_of_ten_among_a_thousand_digits() -> None:
    arguments = ["-n", "1000", "--steps", "100", "--at-least", "0.9"]
    result = subprocess.run(
        [sys.executable, str(DEMO / "check_digits.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout


def test_the_check_says_no_with_exit_code_1() -> None:
    assert check_digits("--at-least", "1.01").returncode == 1


def test_an_engine_that_is_not_there_is_no_traceback() -> None:
    result = check_digits("--engine", "nowhere.onnx")
    assert result.returncode == 2
    assert "error: There is no file nowhere.onnx" in result.stderr
    assert "Traceback" not in result.stderr
