"""Each fault planted inside a graph is detected, and named from the files."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from ddpm_deploy import Engine, Recipe, open_engine
from ddpm_deploy.export.explain import explain, walk
from ddpm_deploy.export.precision import convert
from ddpm_deploy.export.rounding import rounded
from ddpm_deploy.verify.sampled import stratified
from ddpm_deploy.verify.verification import verify
from tests.commands import refusal, run
from tests.support import write_checkpoint
from tests.verify.conftest import DEMO
from tests.verify.graph_faults import GRAPHS, KERNEL, gelu_by_tanh, weight

RECIPE = Recipe(sampler="ddpm", steps=stratified(1000, 16, seed=0))


@pytest.fixture(scope="module")
def healthy(demo: Path) -> Engine:
    return open_engine(demo, threads=1)


@pytest.fixture(scope="module")
def trained() -> Engine:
    return open_engine(DEMO, threads=1)


def planted(demo: Path, fault: str, folder: Path) -> Engine:
    model = onnx.load(demo)
    GRAPHS[fault][1](model)
    onnx.save_model(model, folder / "fault.onnx")
    return open_engine(folder / "fault.onnx", threads=1)


@pytest.mark.parametrize("fault", GRAPHS)
def test_a_fault_inside_the_graph_is_named(
    tmp_path: Path, demo: Path, healthy: Engine, fault: str
) -> None:
    engine = planted(demo, fault, tmp_path)
    found = verify(engine, healthy, RECIPE, range(2))
    assert not found.passed
    assert explain(found, healthy, engine)[0].name == GRAPHS[fault][0]


OF_WEIGHTS = [
    "a kernel transposed",
    "a weight truncated",
    "a bias missing",
    "a weight scaled",
    "weights in fp16",
    "online for average",
]


@pytest.mark.parametrize("fault", OF_WEIGHTS)
def test_a_fault_of_the_weights_is_named_against_the_checkpoint(
    tmp_path: Path, demo: Path, trained: Engine, fault: str
) -> None:
    engine = planted(demo, fault, tmp_path)
    found = verify(engine, trained, RECIPE, range(2))
    assert explain(found, trained, engine)[0].name == GRAPHS[fault][0]


def test_where_the_weights_say_nothing_the_checkpoint_is_traced(
    tmp_path: Path, demo: Path, trained: Engine
) -> None:
    engine = planted(demo, "another epsilon", tmp_path)
    found = verify(engine, trained, RECIPE, range(2))
    (cause, *_) = explain(found, trained, engine)
    assert cause.name == "epsilon"
    assert cause.certain


def test_the_part_in_half_precision_is_named_with_what_it_costs(
    tmp_path: Path, demo: Path, healthy: Engine
) -> None:
    engine = planted(demo, "angles in fp16", tmp_path)
    found = verify(engine, healthy, RECIPE, range(2))
    (cause, *_) = explain(found, healthy, engine)
    assert cause.place == "precision"
    assert "in float32 the output is off by" in cause.evidence[0]


def test_a_healthy_half_precision_graph_is_not_accused(
    tmp_path: Path, demo: Path, healthy: Engine
) -> None:
    onnx.save_model(rounded(convert(onnx.load(demo), "fp16").model), tmp_path / "half.onnx")
    engine = open_engine(tmp_path / "half.onnx", threads=1)
    found = verify(engine, healthy, RECIPE, range(2))
    assert found.passed, found.comparison.failures
    assert found.causes == ()


def test_the_walk_names_the_first_node_and_says_how_much_it_adds(
    tmp_path: Path, demo: Path, healthy: Engine
) -> None:
    engine = planted(demo, "GELU by tanh", tmp_path)
    found = verify(engine, healthy, RECIPE, range(2))
    walked = walk(found, healthy, engine, threads=1)
    first = walked.bisection.first
    assert first is not None
    assert first.node.op_type == "Gelu"
    assert first.input_error < 2e-5 < first.local
    (cause,) = walked.causes()
    assert cause.says.startswith("The first node that differs is Gelu ")
    json.dumps(walked.to_dict(), allow_nan=False)


def test_a_network_that_is_the_same_has_no_such_node(demo: Path, healthy: Engine) -> None:
    other = open_engine(demo, threads=1)
    found = verify(other, healthy, RECIPE, range(2))
    walked = walk(found, healthy, other, threads=1)
    assert list(walked.causes()) == []
    assert "no node by itself is beyond 2e-05" in walked.lines()[0]


def test_the_command_prints_causes_and_the_walk(
    tmp_path: Path, demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = onnx.load(demo)
    gelu_by_tanh(model)
    onnx.save_model(model, "tanh.onnx")
    arguments = ["--against", demo, "--timesteps", 8, "-n", 2, "--threads", 1]
    outcome = run("verify", "-e", "tanh.onnx", *arguments, "--bisect")
    assert outcome.code == 1, outcome
    assert "bisect: " in outcome.out
    assert "cause: GELU is computed by tanh" in outcome.out
    assert "mend: " in outcome.out
    assert "looking for the cause in both files" in outcome.err
    assert outcome.out.endswith("verdict: NOT the same model\n")
    passes = run("verify", "-e", demo, *arguments, "--bisect", "--json")
    assert passes.code == 0
    assert json.loads(passes.out)["bisection"]["first"] is None


def test_a_trace_has_no_graph_to_walk(tmp_path: Path, demo: Path) -> None:
    trace = tmp_path / "unet.trace"
    outcome = run("trace", demo, "-o", trace, "--sampler", "ddim", "--steps", 4, "--threads", 1)
    assert outcome.code == 0, outcome.err
    message = refusal(run("verify", "-e", demo, "--against", trace, "--bisect"))
    assert message.endswith("is a trace, which has no graph that --bisect could walk.")


def test_a_harmless_difference_is_not_the_cause(
    tmp_path: Path, demo: Path, trained: Engine
) -> None:
    # A normalisation follows this kernel, so that its size is no matter; the epsilon is.
    model = onnx.load(demo)
    weight(KERNEL, lambda w: 1.05 * w)(model)
    GRAPHS["another epsilon"][1](model)
    onnx.save_model(model, tmp_path / "both.onnx")
    engine = open_engine(tmp_path / "both.onnx", threads=1)
    found = verify(engine, trained, RECIPE, range(2))
    first, *others = explain(found, trained, engine)
    assert first.name == "epsilon"
    assert first.certain
    assert "undone, the output is off by " in first.evidence[0]
    assert [(c.name, c.certain) for c in others] == [("weight-scaled", False)]


def test_two_faults_are_both_named_and_neither_is_the_whole_cause(
    tmp_path: Path, demo: Path, healthy: Engine
) -> None:
    model = onnx.load(demo)
    GRAPHS["GELU by tanh"][1](model)
    GRAPHS["a bias missing"][1](model)
    onnx.save_model(model, tmp_path / "both.onnx")
    engine = open_engine(tmp_path / "both.onnx", threads=1)
    causes = explain(verify(engine, healthy, RECIPE, range(2)), healthy, engine)
    assert [c.name for c in causes][:2] == ["bias-missing", "gelu"]  # the larger one first
    assert not any(c.certain for c in causes)


def test_another_checkpoint_is_said_first_and_alone(tmp_path: Path) -> None:
    engines = []
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        folder.mkdir()
        checkpoint = write_checkpoint(folder / "ckpt.pt", seed=seed)
        assert run("export", checkpoint, "-o", folder / "unet.onnx").code == 0
        engines.append(open_engine(folder / "unet.onnx", threads=1))
    reference, engine = engines
    found = verify(engine, reference, Recipe(), range(2))
    first, *others = explain(found, reference, engine)
    assert first.name == "other-weights"
    assert first.certain
    assert first.says.startswith("The engine was made from another checkpoint file")
    assert "SHA-256" in first.evidence[0]
    assert {c.name for c in others} <= {"another-checkpoint"}
