from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from scipy import stats
from typer.testing import CliRunner

from ddpm_deploy import Condition, ModelSpec, linear
from ddpm_deploy.cli.app import app
from ddpm_deploy.spec import METADATA_KEY
from tests.support import tiny_spec, write_graph

MEAN, STD = 0.1, 0.2


def write_gaussian(path: Path, spec: ModelSpec) -> Path:
    """Writes the exact ε for N(MEAN, STD²) data: gain[t]·x + shift[t], and 0·y where labelled."""
    a = np.asarray(spec.schedule.alpha_bar)
    gain = np.sqrt(1 - a) / (a * STD**2 + 1 - a)
    tables = {"gain": gain, "shift": -gain * np.sqrt(a) * MEAN}
    constants = [
        numpy_helper.from_array(v.astype(np.float32).reshape(-1, 1, 1, 1), k)
        for k, v in tables.items()
    ]
    nodes = [
        helper.make_node("Gather", ["gain", "t"], ["g"]),
        helper.make_node("Gather", ["shift", "t"], ["s"]),
        helper.make_node("Mul", ["x", "g"], ["scaled"]),
        helper.make_node("Add", ["scaled", "s"], ["out"]),
    ]
    shape: list[str | int | None] = ["batch", *spec.sample_shape]
    graph = helper.make_graph(
        nodes,
        "gaussian",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, shape),
            helper.make_tensor_value_info("t", TensorProto.INT64, ["batch"]),
        ],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, shape)],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(model, {METADATA_KEY: spec.to_json()})
    onnx.save_model(model, path)
    return path


def write_data(path: Path, n: int = 40, *, labels: bool = False, size: int = 8) -> Path:
    generator = np.random.default_rng(0)
    x = generator.normal(MEAN, STD, (n, size, size))
    images = np.clip(np.rint((x + 1) * 127.5), 0, 255).astype(np.uint8)
    if labels:
        np.savez(path, images=images, labels=np.arange(n) % 3)
    else:
        np.savez(path, images=images)
    return path


def run(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["nll", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def report(*arguments: str | Path) -> dict[str, Any]:
    code, out, err = run(*arguments, "--json")
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


@pytest.fixture
def gaussian(tmp_path: Path) -> tuple[Path, Path]:
    # β rises by small factors, so that σ² = β is near the best and the bound near the entropy.
    schedule = linear(400, start=2e-4, end=0.05)
    spec = ModelSpec(
        sample_shape=(1, 8, 8), schedule=schedule, variance="fixed_large", clip=None, family="test"
    )
    return write_gaussian(tmp_path / "g.onnx", spec), write_data(tmp_path / "data.npz")


def test_the_exact_network_s_bound_is_near_the_data_s_entropy(
    gaussian: tuple[Path, Path],
) -> None:
    engine, data = gaussian
    found = report("--engine", engine, "--data", data, "-n", "40", "--timesteps", "399")
    bits = found["bits_per_dim"]
    edges = (np.arange(257) - 0.5) / 127.5 - 1
    edges[0], edges[-1] = -np.inf, np.inf
    weights = np.diff(stats.norm(MEAN, STD).cdf(edges))
    # The code length of these very pictures under the distribution that they come from.
    images = np.load(data)["images"]
    own = -np.log2(weights[images]).mean()
    assert own < bits["total"] < own + 1
    assert bits["total"] == pytest.approx(bits["L_T"] + bits["L_t"] + bits["L_0"])
    assert 0 < bits["standard_error"] < 0.1
    assert len(found["L_t"]) == found["timesteps"] == 399
    assert [found["L_t"][0]["first"], found["L_t"][-1]["last"]] == [1, 399]
    assert found["labels"] == "none"

    fewer = report("--engine", engine, "--data", data, "-n", "40", "--timesteps", "30")
    assert len(fewer["L_t"]) == 30
    error = math.hypot(bits["standard_error"], fewer["bits_per_dim"]["standard_error"])
    assert abs(fewer["bits_per_dim"]["total"] - bits["total"]) < 4 * error
    assert fewer["bits_per_dim"]["L_0"] == bits["L_0"]


def test_the_batch_does_not_change_the_bound(gaussian: tuple[Path, Path]) -> None:
    engine, data = gaussian
    common = ("--engine", engine, "--data", data, "-n", "10", "--timesteps", "20", "--seed", "3")
    one, all_at_once = (report(*common, "--batch", batch) for batch in ("3", "10"))
    # The runtime may add in another order at another batch; float64 sums do so too.
    assert one["bits_per_dim"]["total"] == pytest.approx(
        all_at_once["bits_per_dim"]["total"], rel=1e-6
    )
    assert one["seed"] == 3


def test_the_table_has_the_terms_and_their_sum(gaussian: tuple[Path, Path]) -> None:
    engine, data = gaussian
    code, out, err = run("--engine", engine, "--data", data, "-n", "6", "--timesteps", "20")
    assert code == 0
    assert "6 of 40 pictures" in out
    for term in ("L_T", "L_0", "to L_399", "total", "±"):
        assert term in out
    assert "bound on onnxruntime CPU" in err


def test_pictures_are_taken_from_all_of_the_data(tmp_path: Path) -> None:
    """Class folders come sorted, so the first n would be one class."""
    spec = tiny_spec(classes=3)
    engine = write_graph(tmp_path / "c.onnx", spec)
    images = np.zeros((30, 8, 8), np.uint8)
    images[20:] = 255  # hard for this network, in another way than black
    np.savez(tmp_path / "d.npz", images=images, labels=np.repeat([0, 1, 2], 10))
    few = report("--engine", engine, "--data", tmp_path / "d.npz", "-n", "3")
    black = report("--engine", engine, "--data", tmp_path / "d.npz", "-n", "1")
    assert few["pictures"] == 3
    assert few["bits_per_dim"]["standard_error"] > 0.01
    assert black["bits_per_dim"]["standard_error"] is None


def test_a_conditional_network_gets_the_data_s_labels_or_the_null_label(tmp_path: Path) -> None:
    engine = write_graph(tmp_path / "c.onnx", tiny_spec(classes=3))
    labelled = write_data(tmp_path / "labelled.npz", 6, labels=True)
    plain = write_data(tmp_path / "plain.npz", 6)
    by_label = report("--engine", engine, "--data", labelled)
    assert by_label["labels"] == "the data's, 0..2 of 0..2"
    without = report("--engine", engine, "--data", plain)
    assert without["labels"].startswith("the null label 3")
    free = report("--engine", engine, "--data", labelled, "--label-free")
    assert free["labels"] == "the null label 3, as asked"
    assert free["bits_per_dim"] == without["bits_per_dim"]
    assert free["bits_per_dim"]["total"] != by_label["bits_per_dim"]["total"]
    _, _, err = run("--engine", engine, "--data", plain)
    assert "labels: the null label 3" in err


def test_digits_are_measured_by_name(tmp_path: Path) -> None:
    engine = write_graph(tmp_path / "u.onnx", tiny_spec())
    found = report("--engine", engine, "--data", "digits", "-n", "5")
    assert found["data"]["source"] == "digits"
    assert found["data"]["of"] == 1797
    assert found["timesteps"] == 19  # 100 when nothing is said, or all that there are


def test_a_network_that_never_saw_timestep_0_is_measured_and_it_is_said(tmp_path: Path) -> None:
    engine = write_graph(tmp_path / "u.onnx", tiny_spec().with_changes(first_timestep=1))
    code, _, err = run("--engine", engine, "--data", write_data(tmp_path / "d.npz", 2))
    assert code == 0
    assert "never saw t < 1 in training" in err


def test_mistakes_are_one_message(tmp_path: Path) -> None:
    spec = tiny_spec(classes=2)
    labels_without_null = (Condition(name="y", meaning="class_label", dtype="int64", classes=3),)
    engine = write_graph(tmp_path / "c.onnx", spec)
    no_null = write_graph(tmp_path / "n.onnx", spec.with_changes(conditions=labels_without_null))
    plain_engine = write_graph(tmp_path / "u.onnx", tiny_spec())
    labelled = write_data(tmp_path / "labelled.npz", 6, labels=True)
    plain = write_data(tmp_path / "plain.npz", 6)
    sequence = ModelSpec(sample_shape=(8, 8), schedule=linear(5))
    mistakes: list[tuple[list[str | Path], str]] = [
        (["--engine", engine, "--data", labelled], "has labels 0..2; this network has 0..1."),
        (["--engine", no_null, "--data", plain], "has no labels, and this network has no null"),
        (["--engine", no_null, "--data", labelled, "--label-free"], "has no null label"),
        (["--engine", plain_engine, "--data", plain, "--label-free"], "is unconditional"),
        (["--engine", plain_engine, "--data", plain, "--timesteps", "20"], "has 1 to 19"),
        (["--engine", plain_engine, "--data", tmp_path / "none"], "There is no folder or file"),
        (["--engine", tmp_path / "none.onnx", "--data", plain], "There is no file"),
        (["--engine", plain_engine], "Missing option '--data'"),
        (
            ["--engine", write_graph(tmp_path / "s.onnx", sequence), "--data", plain],
            "no pictures",
        ),
    ]
    for arguments, message in mistakes:
        code, out, err = run(*arguments)
        assert code == 2, message
        assert out == ""
        assert message in " ".join(err.split())
