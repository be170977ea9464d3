"""Each planted fault is detected, and named."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ddpm_deploy import Engine, Recipe, open_engine
from ddpm_deploy.arrays import Samples
from ddpm_deploy.verify import Loop, engine_loop, record
from ddpm_deploy.verify.compare import Side
from ddpm_deploy.verify.sampled import stratified
from ddpm_deploy.verify.trace import loop_steps
from ddpm_deploy.verify.verification import Verification, verify
from tests.support import tiny_spec, write_checkpoint, write_graph
from tests.verify import faults
from tests.verify.conftest import DEMO
from tests.verify.faults import World, Wrong


@pytest.fixture(scope="module")
def world(demo: Path) -> World:
    """The demo's network in 24 of its 1000 timesteps."""
    recipe = Recipe(sampler="ddpm", steps=stratified(1000, 24, seed=0))
    return World(good=open_engine(demo, threads=1), recipe=recipe, images=range(4))


@pytest.fixture(scope="module")
def trained() -> Engine:
    return open_engine(DEMO, threads=1)


def compared(side: Side, reference: Side, world: World) -> Verification:
    return verify(side, reference, world.recipe, world.images)


def names(found: Verification) -> list[str]:
    return [cause.name for cause in found.causes]


@pytest.mark.parametrize("fault", faults.LOOPS)
@pytest.mark.parametrize("recorded", [False, True], ids=["live", "recorded"])
def test_a_fault_of_the_loop_is_named(
    world: World, trained: Engine, fault: str, recorded: bool
) -> None:
    wanted, plant = faults.LOOPS[fault]
    loop = plant(world)
    found = compared(world.trace(loop) if recorded else loop, trained, world)
    assert not found.passed
    assert names(found)[0] == wanted


@pytest.mark.parametrize(
    "fault",
    ["noise per batch", "another seed", "one noise for all", "β for β̃", "1 / α for 1 / √α"],
)
def test_a_fault_of_the_loop_is_named_without_a_stride(engine: Engine, fault: str) -> None:
    # No timestep lies between two visited ones, so a wrong stride has a row for the last step
    # alone, which these faults leave as it was.
    wanted, plant = faults.LOOPS[fault]
    world = World(good=engine, recipe=Recipe(), images=range(4))
    assert names(compared(plant(world), engine, world))[0] == wanted


@pytest.mark.parametrize("fault", faults.NETWORKS)
def test_a_fault_around_the_network_is_named(world: World, trained: Engine, fault: str) -> None:
    wanted, plant = faults.NETWORKS[fault]
    found = compared(plant(world), trained, world)
    assert not found.passed
    assert names(found)[0] == wanted


@pytest.mark.parametrize("fault", ["t + 1", "t - 1", "the next label", "height and width", "-ε"])
def test_a_fault_around_the_network_is_named_against_a_trace(world: World, fault: str) -> None:
    # A device without torch has the trace alone, so the faults are undone on its own network.
    wanted, plant = faults.NETWORKS[fault]
    found = compared(plant(world), world.trace(world.loop()), world)
    assert names(found)[0] == wanted


@pytest.mark.parametrize("fault", faults.PICTURES)
def test_a_fault_of_the_pictures_is_named(world: World, trained: Engine, fault: str) -> None:
    wanted, plant = faults.PICTURES[fault]
    found = compared(plant(world), trained, world)
    assert not found.passed
    assert names(found) == [wanted]


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_another_eta_is_named_with_its_value(world: World, eta: float) -> None:
    recipe = Recipe(sampler="ddim", steps=25)
    wrong = engine_loop(world.good, replace(recipe, eta=eta), world.images)
    found = verify(wrong, world.good, recipe, world.images)
    assert names(found) == ["wrong-eta"]
    assert found.causes[0].says == f"The deployed loop has eta {eta:g}; the reference has 0."


def test_a_direction_from_the_raw_output_is_named(world: World) -> None:
    recipe = Recipe(sampler="ddim", steps=25)
    spec = world.good.spec
    rows = []
    for row in recipe.table(spec):
        # Song et al. 2021, Eq. 12, with ε as the network gave it: what diffusers does by default.
        a = spec.schedule.alpha_bar_at(row.s)
        raw = math.sqrt(1 - a)
        rows.append(replace(row, x_from_x0=math.sqrt(a), x_from_x=0.0, x_from_out=raw))
    noise = engine_loop(world.good, recipe, world.images)
    loop = Loop(noise.predict, rows, noise.noise, spec=spec)
    assert names(verify(loop, world.good, recipe, world.images)) == ["ddim-direction"]


def test_other_timesteps_are_named_with_the_first_that_differs(world: World) -> None:
    recipe = Recipe(sampler="ddim", steps=25)
    trailing = engine_loop(world.good, replace(recipe, spacing="trailing"), world.images)
    found = verify(trailing, world.good, recipe, world.images)
    assert names(found)[0] == "other-timesteps"
    assert "step 1 is t = 999 in place of 960" in found.causes[0].evidence[0]


def test_guidance_that_is_left_out_is_named_with_its_value(world: World) -> None:
    recipe = replace(world.recipe, guidance=3.0)
    left_out = engine_loop(world.good, world.recipe, world.images)
    found = verify(left_out, world.good, recipe, world.images)
    assert names(found)[0] == "wrong-guidance"
    assert found.causes[0].says == "The deployed loop has guidance 1; the reference has 3."


def test_guidance_that_changes_with_t_is_no_other_guidance(world: World) -> None:
    weak, strong = (
        engine_loop(world.good, replace(world.recipe, guidance=s), world.images) for s in (0.5, 6.0)
    )
    changing = world.loop(predict=lambda x, t: (weak if t[0] < 500 else strong).predict(x, t))
    found = compared(changing, world.good, world)
    assert not found.passed
    assert names(found) == ["network"]


def in_channels_last(x: Samples) -> Samples:
    """Gives the bytes of (N, H, W, C) to what takes (N, C, H, W)."""
    return np.stack([np.ascontiguousarray(np.moveaxis(each, 0, -1)) for each in x]).reshape(x.shape)


CHANNELS: dict[str, Callable[[Engine], Engine]] = {
    "in": lambda good: Wrong(good, x=lambda x: x[:, ::-1]),
    "out": lambda good: Wrong(good, out=lambda out, x, t: out[:, ::-1]),
    "in and out": lambda good: Wrong(
        good, x=lambda x: x[:, [2, 0, 1]], out=lambda out, x, t: out[:, [1, 2, 0]]
    ),
    "last": lambda good: Wrong(good, x=in_channels_last),
}


@pytest.mark.parametrize("where", CHANNELS)
@pytest.mark.parametrize("live", [True, False], ids=["live", "trace"])
def test_a_channel_order_is_named(tmp_path: Path, where: str, live: bool) -> None:
    spec = replace(tiny_spec(), sample_shape=(3, 8, 8))
    good = open_engine(write_coloured(tmp_path / "rgb.onnx"), spec=spec)
    reference: Side = good
    if not live:
        loop = engine_loop(good, Recipe(), range(2))
        reference = record(loop_steps(loop), spec=good.spec, recipe=Recipe(), images=range(2))
    found = verify(CHANNELS[where](good), reference, Recipe(), range(2))
    assert names(found)[0] == ("memory-layout" if where == "last" else "channel-order")


def write_coloured(path: Path) -> Path:
    """Writes a checkpoint of three channels that differ."""
    import torch

    from tests.support import tiny_network

    spec = replace(tiny_spec(), sample_shape=(3, 8, 8))
    checkpoint = path.with_suffix(".pt")
    network = tiny_network(channels=3)
    own = {"format": 1, "spec": spec.to_json()}
    torch.save({"ddpm_deploy": own, "ema": network.state_dict()}, checkpoint)
    return checkpoint


def test_a_wrong_spec_is_named_by_its_field(tmp_path: Path) -> None:
    good = open_engine(write_graph(tmp_path / "unet.onnx", tiny_spec()))
    other = open_engine(
        write_graph(tmp_path / "other.onnx", replace(tiny_spec(), variance="fixed_large"))
    )
    found = verify(other, good)
    assert names(found) == ["wrong-variance"]
    assert found.causes[0].place == "file"
    assert "fixed_small in the reference, fixed_large in the engine" in found.causes[0].evidence[0]


def test_an_engine_of_another_checkpoint_is_named_so(tmp_path: Path) -> None:
    engines = []
    for seed in (0, 1):
        path = write_checkpoint(tmp_path / f"{seed}.pt", seed=seed)
        engines.append(open_engine(path))
    found = verify(engines[1], engines[0])
    assert names(found)[0] == "another-checkpoint"
    assert found.same_checkpoint is False


def test_a_cause_tells_what_was_measured_and_what_to_do(world: World, trained: Engine) -> None:
    _, plant = faults.NETWORKS["t + 1"]
    (cause, *_) = compared(plant(world), trained, world).causes
    assert cause.says == "The deployed network is fed t+1 in place of t."
    assert "so fed gives that output" in cause.evidence[0]
    assert cause.mend
    assert cause.certain


def test_healthy_pairs_have_no_cause(world: World, trained: Engine) -> None:
    for side in (world.good, world.loop(), world.trace(world.loop())):
        found = compared(side, trained, world)
        assert found.passed, found.comparison.failures
        assert found.causes == ()
        assert found.comparison.worst_local.local.out.max < 2e-5


def test_a_small_fault_within_a_large_budget_is_no_failure(world: World) -> None:
    near = Wrong(world.good, out=lambda out, x, t: out * np.float32(1 + 1e-5))
    found = compared(near, world.good, world)
    assert found.passed
    assert found.causes == ()


def test_what_no_known_fault_explains_is_said_to_be_the_network(world: World) -> None:
    noisy = Wrong(
        world.good, out=lambda out, x, t: out + np.float32(0.05) * np.sin(7 * x) * np.cos(3 * out)
    )
    found = compared(noisy, world.good, world)
    assert names(found) == ["network"]
    assert "no change of t, label, channels, range or prediction" in found.causes[0].evidence[1]
    assert not found.causes[0].certain


def test_a_loop_of_ones_own_is_a_side(world: World) -> None:
    loop = world.loop()
    assert isinstance(loop, Loop)
    assert compared(loop, world.good, world).passed
