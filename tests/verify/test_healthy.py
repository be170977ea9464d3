"""No false alarm: every runtime of this machine is PyTorch's loop, within what float32 explains."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from ddpm_deploy import Engine, Recipe, open_engine
from ddpm_deploy.export.fuse_step import fuse_file
from ddpm_deploy.export.precision import convert
from ddpm_deploy.export.rounding import rounded
from ddpm_deploy.verify.sampled import stratified
from ddpm_deploy.verify.verification import Verification, verify
from tests.commands import run
from tests.support import write_state_dict
from tests.verify.conftest import DEMO

RECIPES = {
    "ddpm": Recipe(sampler="ddpm", steps=stratified(1000, 30, seed=1)),
    "ddim": Recipe(sampler="ddim", steps=20),
    "ddim, eta": Recipe(sampler="ddim", steps=20, eta=0.7, spacing="trailing"),
    "dome272": Recipe(sampler="dome272", steps=stratified(1000, 20, seed=2, first=1)),
    "one step": Recipe(sampler="ddim", steps=1, spacing="trailing"),
    "two steps, guided": Recipe(sampler="ddim", steps=2, spacing="linspace", guidance=7.5),
    "three steps, guided": Recipe(sampler="ddpm", steps=3, spacing="linspace", guidance=7.5),
    "guided": Recipe(sampler="ddim", steps=20, guidance=2.0, labels=(3, 8)),
}


@pytest.fixture(scope="module")
def trained() -> Engine:
    return open_engine(DEMO, threads=1)


def opened(graph: Path, runtime: str, folder: Path) -> Engine:
    match runtime:
        case "openvino":
            pytest.importorskip("openvino", reason="of the development set-up")
            from tests.openvino_engine import OpenVinoEngine

            return OpenVinoEngine(graph)
        case "fused":
            fuse_file(graph, folder / "fused.onnx")
            return open_engine(folder / "fused.onnx", threads=1)
        case "built":
            built = folder / "unet.ort.onnx"
            outcome = run("build", graph, "-o", built, "--runtime", "onnxruntime")
            assert outcome.code == 0, outcome.err
            return open_engine(built, threads=1)
        case _:
            return open_engine(graph, threads=1)


def healthy(found: Verification) -> None:
    assert found.passed, found.comparison.failures
    assert found.causes == ()
    assert 0 < found.comparison.worst_local.local.out.max < 2e-5


@pytest.fixture(scope="module", params=["onnxruntime", "openvino", "fused", "built"])
def deployed(request: pytest.FixtureRequest, demo: Path) -> Engine:
    return opened(demo, request.param, demo.parent)


@pytest.mark.parametrize("loop", RECIPES)
def test_a_float32_runtime_is_the_trained_demo(
    deployed: Engine, trained: Engine, loop: str
) -> None:
    healthy(verify(deployed, trained, RECIPES[loop], range(3)))


def test_openvino_is_the_trained_demo_over_all_1000_steps(demo: Path, trained: Engine) -> None:
    pytest.importorskip("openvino", reason="of the development set-up")
    found = verify(opened(demo, "openvino", demo.parent), trained, Recipe(), range(1))
    assert found.sampled.says == "all 1000 timesteps"
    healthy(found)


@pytest.mark.parametrize(("channels", "classes"), [(3, 0), (1, 4)])
def test_every_form_of_checkpoint_is_its_export(
    tmp_path: Path, channels: int, classes: int
) -> None:
    checkpoint = tmp_path / "ckpt.pt"
    write_state_dict(checkpoint, channels=channels, classes=classes, prefix="module.")
    graph = tmp_path / "unet.onnx"
    outcome = run("export", checkpoint, "-o", graph, "--image-size", 16)
    assert outcome.code == 0, outcome.err
    deployed = open_engine(graph, threads=1)
    reference = open_engine(checkpoint, spec=deployed.spec, threads=1)
    recipe = Recipe(steps=stratified(1000, 12, seed=0, first=1))
    healthy(verify(deployed, reference, recipe, range(2)))


@pytest.fixture(scope="module", params=["fp16", "bf16"])
def half(request: pytest.FixtureRequest, demo: Path) -> Engine:
    """The demo in half precision, every result rounded to it."""
    precision = request.param
    path = demo.parent / f"{precision}.onnx"
    onnx.save_model(rounded(convert(onnx.load(demo), precision).model), path)
    return open_engine(path, threads=1)


def test_half_precision_is_inside_its_budget_and_outside_float32_s(
    half: Engine, trained: Engine
) -> None:
    recipe = RECIPES["ddpm"]
    found = verify(half, trained, recipe, range(3))
    assert found.passed, found.comparison.failures
    assert found.causes == ()
    assert found.comparison.worst_local.local.out.max > 2e-4


def test_bfloat16_for_real_has_a_curve_of_its_own(demo: Path, trained: Engine) -> None:
    pytest.importorskip("openvino", reason="of the development set-up")
    from tests.openvino_engine import OpenVinoEngine

    engine = OpenVinoEngine(demo, precision="bf16")
    if "bf16" not in engine.computes_in and "bfloat16" not in engine.computes_in:
        pytest.skip(f"this processor has no bfloat16; OpenVINO computes in {engine.computes_in}")
    found = verify(engine, trained, RECIPES["ddpm"], range(3))
    # It rounds what depends on t too, which `build --bf16` keeps in float32.
    errors = [step.local.out.l2 for step in found.comparison.steps]
    assert 2**-9 < min(errors) < max(errors) < 0.2


def test_labels_in_turn_and_seeds_make_no_alarm(demo: Path, trained: Engine) -> None:
    engine = open_engine(demo, threads=1)
    for recipe in (
        replace(RECIPES["ddim"], labels=(1, 7, 4), seed=2**64 - 1),
        replace(RECIPES["ddim"], labels=(10,), seed=5),
    ):
        healthy(verify(engine, trained, recipe, [0, 17, 2**40]))
