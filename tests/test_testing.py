"""What a user's own test does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from ddpm_deploy import Recipe
from ddpm_deploy.errors import ParityError
from ddpm_deploy.testing import assert_same_model
from ddpm_deploy.verify import Budget
from tests.support import tiny_spec, write_graph
from tests.verify.graph_faults import set_attribute


@pytest.fixture
def same(tmp_path: Path) -> tuple[Path, Path]:
    spec = tiny_spec(timesteps=100)
    return write_graph(tmp_path / "a.onnx", spec), write_graph(tmp_path / "b.onnx", spec)


def test_the_same_model_passes_and_the_findings_come_back(same: tuple[Path, Path]) -> None:
    found = assert_same_model(*same, timesteps=10, images=2)
    assert found.sampled.says.startswith("10 of 100 timesteps")
    assert len(found.images) == 2


def test_another_model_fails_with_its_values_and_the_cause(tmp_path: Path) -> None:
    good = write_graph(tmp_path / "a.onnx", tiny_spec())
    model = onnx.load(good)
    (tanh,) = [node for node in model.graph.node if node.op_type == "Tanh"]
    tanh.op_type = "Elu"
    set_attribute(tanh, "alpha", 1.0)
    onnx.save_model(model, tmp_path / "b.onnx")
    with pytest.raises(AssertionError) as raised:
        assert_same_model(tmp_path / "b.onnx", good)
    message = str(raised.value)
    assert f"{tmp_path / 'b.onnx'} is not the model of {good}:" in message
    assert "local error of the output: max " in message
    assert "likely cause: " in message


def test_a_budget_is_an_object_a_name_or_a_file(tmp_path: Path) -> None:
    good = write_graph(tmp_path / "a.onnx", tiny_spec())
    near = write_graph(tmp_path / "b.onnx", tiny_spec(), bias=1e-4)
    with pytest.raises(AssertionError):
        assert_same_model(near, good)
    assert_same_model(near, good, budget="fp16")
    assert_same_model(near, good, budget=Budget.of("bf16"))
    file = tmp_path / "budget.toml"
    file.write_text(Budget.of("fp16").to_toml())
    assert_same_model(near, good, budget=file)


def test_a_loop_is_chosen_by_its_recipe(same: tuple[Path, Path]) -> None:
    found = assert_same_model(*same, recipe=Recipe(sampler="ddim", steps=5, seed=4))
    assert [step.t for step in found.comparison.steps] == [80, 60, 40, 20, 0]


def test_what_cannot_be_compared_is_no_assertion(tmp_path: Path) -> None:
    a = write_graph(tmp_path / "a.onnx", tiny_spec())
    b = write_graph(tmp_path / "b.onnx", tiny_spec(size=16))
    with pytest.raises(ParityError, match="makes samples of"):
        assert_same_model(a, b)


def test_the_three_lines_of_the_documentation_are_a_test(
    tmp_path: Path, same: tuple[Path, Path]
) -> None:
    (tmp_path / "test_mine.py").write_text(
        "from ddpm_deploy.testing import assert_same_model\n\n\n"
        "def test_the_deployed_loop_is_the_trained_model():\n"
        f"    assert_same_model({str(same[0])!r}, {str(same[1])!r}, timesteps=50)\n"
    )
    outcome = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_mine.py"],
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
    )
    assert outcome.returncode == 0, outcome.stdout
    assert "1 passed" in outcome.stdout
