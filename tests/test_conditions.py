"""Networks that see an observation, and networks that see the last step's x_0."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from ddpm_deploy import Recipe, SeededNoise, open_engine, sample
from ddpm_deploy.arrays import Samples
from ddpm_deploy.engines import Engine
from ddpm_deploy.errors import EngineInputError
from ddpm_deploy.run import Run
from ddpm_deploy.sampling import Table, denoise, looks_back
from ddpm_deploy.spec import ModelSpec, Restore
from ddpm_deploy.verify.compare import Verifier
from ddpm_deploy.verify.loops import engine_loop
from ddpm_deploy.verify.trace import loop_steps, read_trace, record, write_trace
from tests.support import conditioned_spec, tiny_spec, write_conditioned, write_graph

OBSERVED = ((1.0, 2.0, 3.0, 4.0, 5.0, 6.0), (-1.0, 0.0, 1.0, 0.0, -1.0, 4.0))
RECIPE = Recipe(seed=3, observations={"obs": OBSERVED})


@pytest.fixture
def conditioned(tmp_path: Path) -> Engine:
    return open_engine(write_conditioned(tmp_path / "net.onnx", conditioned_spec()))


def by_hand(table: Table, noise: SeededNoise, observed: Samples) -> Samples:
    """The loop in NumPy, with the network's formula written out: the last x_0 goes in again."""
    x, last = noise(0), np.zeros_like(noise(0))
    for k, row in enumerate(table, start=1):
        out = 0.8 * np.tanh(x) + 0.5 * last + 0.3 * observed.mean((1, 2), keepdims=True)
        out = (out + row.t / 100).astype(np.float32)
        last = np.clip(row.x0_from_x * x + row.x0_from_out * out, -1, 1)
        x = row.x_from_x0 * last + row.x_from_x * x
        if row.x_from_noise:
            x = x + row.x_from_noise * noise(k)
    return x


def test_the_loop_gives_a_self_conditioned_network_its_last_x0(conditioned: Engine) -> None:
    observed = np.array([OBSERVED[i % 2] for i in range(5)], np.float32).reshape(5, 2, 3)
    noise = SeededNoise(3, range(5), (4, 6))
    wanted = by_hand(conditioned.spec.table(), noise, observed)
    np.testing.assert_allclose(sample(conditioned, RECIPE, range(5)), wanted, atol=2e-5)


def test_an_image_is_the_same_in_any_batch_of_a_self_conditioned_network(
    conditioned: Engine,
) -> None:
    whole = sample(conditioned, RECIPE, range(6))
    parts = [sample(conditioned, RECIPE, [i]) for i in range(6)]
    assert np.array_equal(whole, np.concatenate(parts))


def test_observations_are_taken_in_turn(conditioned: Engine) -> None:
    first = sample(conditioned, RECIPE, [0])
    other = Recipe(seed=3, observations={"obs": OBSERVED[::-1]})
    assert not np.array_equal(sample(conditioned, other, [0]), first)
    alone = Recipe(seed=3, observations={"obs": OBSERVED[:1]})
    assert np.array_equal(sample(conditioned, alone, [0]), first)
    assert np.array_equal(sample(conditioned, alone, [2]), sample(conditioned, RECIPE, [2]))


@pytest.mark.parametrize(
    ("observations", "message"),
    [
        ({}, r"is conditioned on obs, float32 \(2, 3\), and none is given"),
        ({"obs": ((1.0, 2.0),)}, r"obs has 2 numbers an image; .* takes \(2, 3\)"),
        ({"obs": OBSERVED, "image": ((1.0,),)}, "has no input called image; it takes obs"),
        ({"obs": OBSERVED, "last": ((0.0,) * 24,)}, "has no input called last"),
    ],
)
def test_observations_that_do_not_fit_are_refused(
    conditioned: Engine, observations: Mapping[str, tuple[tuple[float, ...], ...]], message: str
) -> None:
    with pytest.raises(EngineInputError, match=message):
        sample(conditioned, Recipe(observations=observations), range(2))


def test_a_network_without_observations_takes_none(tmp_path: Path) -> None:
    engine = open_engine(write_graph(tmp_path / "unet.onnx", tiny_spec()))
    with pytest.raises(EngineInputError, match="has no input called obs; it takes no observation"):
        sample(engine, RECIPE, [0])


def test_samples_come_out_in_their_own_units(tmp_path: Path) -> None:
    plain = conditioned_spec()
    scale, offset = (1.0, 2.0, 4.0, 0.5), (0.0, -1.0, 10.0, 3.0)
    spec = plain.with_changes(restore=Restore(scale=scale, offset=offset, axis=0))
    normal = sample(open_engine(write_conditioned(tmp_path / "a.onnx", plain)), RECIPE, range(2))
    engine = open_engine(write_conditioned(tmp_path / "b.onnx", spec))
    wanted = normal * np.array(scale, np.float32)[:, None] + np.array(offset, np.float32)[:, None]
    assert np.array_equal(sample(engine, RECIPE, range(2)), wanted)
    run = Run(folder=tmp_path / "run", engine=engine, recipe=RECIPE, count=2, batch=2)
    run.prepare()
    files = list(run.draw(on_step=lambda _: None))
    assert np.array_equal(np.stack([np.load(file) for file in files]), wanted)


def test_units_go_along_the_axis_that_they_name() -> None:
    x = np.ones((1, 2, 3), np.float32)
    along = Restore(scale=(1, 2, 3), offset=(0, 0, 1), axis=-1)(x)
    assert along.tolist() == [[[1, 2, 4], [1, 2, 4]]]
    assert Restore(scale=(2,), offset=(1,))(x).tolist() == [[[3, 3, 3], [3, 3, 3]]]


@pytest.mark.parametrize(
    "restore",
    [
        Restore(scale=(1.0, 2.0), offset=(0.0, 0.0), axis=0),
        Restore(scale=(1.0,), offset=(0.0, 1.0)),
        Restore(scale=(1.0,), offset=(float("nan"),)),
        Restore(scale=(1.0,), offset=(0.0,), axis=2),
    ],
)
def test_units_that_do_not_fit_the_samples_make_no_spec(restore: Restore) -> None:
    with pytest.raises(ValueError, match="restore"):
        conditioned_spec(restore=restore)


def test_a_spec_with_all_of_a_family_s_loop_travels_bit_for_bit() -> None:
    spec = conditioned_spec(
        restore=Restore(scale=(0.1,) * 6, offset=(1 / 3,) * 6),
        network={"heads": 4, "dims": [1, 2]},
        weights="online",
        sampler="ddim",
    )
    read = ModelSpec.from_json(spec.to_json())
    assert read == spec.with_changes(network={"heads": 4, "dims": (1, 2)})
    assert read.to_json() == spec.to_json()


def test_a_self_conditioned_engine_is_the_same_model_as_itself(
    conditioned: Engine, tmp_path: Path
) -> None:
    twin = open_engine(write_conditioned(tmp_path / "twin.onnx", conditioned.spec))
    verifier = Verifier(conditioned, twin, RECIPE, range(2))
    assert max(step.local.x.max for step in verifier) == 0
    assert verifier.result.passed


def test_a_network_that_sees_the_last_x0_otherwise_is_told_by_its_local_error(
    conditioned: Engine, tmp_path: Path
) -> None:
    other = open_engine(write_conditioned(tmp_path / "b.onnx", conditioned.spec, seen=0.4))
    verifier = Verifier(conditioned, other, RECIPE, range(2))
    steps = list(verifier)
    # At the first step it sees zeros on both sides.
    assert steps[0].local.out.max == 0
    assert all(step.local.out.max > 1e-4 for step in steps[2:])
    assert not verifier.result.passed


def test_a_trace_of_a_loop_that_looks_back_is_compared_step_by_step(
    conditioned: Engine, tmp_path: Path
) -> None:
    loop = engine_loop(conditioned, RECIPE, range(2))
    assert looks_back(loop.predict, loop.table)
    steps = loop_steps(loop)
    trace = record(steps, spec=conditioned.spec, recipe=RECIPE, images=range(2), keep=5)
    write_trace(tmp_path / "net.trace", trace)
    read = read_trace(tmp_path / "net.trace")
    assert read.recipe == RECIPE
    for k, step in read.steps.items():
        assert (step.before is None) == (k == 1)
    other = open_engine(write_conditioned(tmp_path / "b.onnx", conditioned.spec, seen=0.4))
    assert all(step.local.out.max == 0 for step in Verifier(read, conditioned))
    worst = [step.local.out.max for step in Verifier(read, other)]
    assert worst[0] == 0
    assert min(worst[1:]) > 1e-4
    # The other way round: the trace is the deployed side.
    assert all(step.local.out.max == 0 for step in Verifier(conditioned, read))


def test_a_row_that_looks_back_needs_the_step_before() -> None:
    spec = tiny_spec()
    row = spec.table()[3]
    back = [type(row)(**{**vars(row), "x_from_before": 0.5})]
    noise = SeededNoise(0, range(1), spec.sample_shape)
    with pytest.raises(ValueError, match="needs the x_0 of the step before"):
        list(denoise(lambda x, _: x, back, noise))
    before = np.ones((1, 1, 8, 8), np.float32)
    (with_it,) = denoise(lambda x, _: x, back, noise, before=before)
    (without,) = denoise(lambda x, _: x, [row], noise)
    np.testing.assert_allclose(with_it.x - without.x, 0.5, rtol=0, atol=1e-6)
