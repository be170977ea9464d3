from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ddpm_deploy.run import Recipe
from ddpm_deploy.verify.sampled import Sampled, drawn_steps, looked_at, stratified
from tests.support import tiny_spec


@pytest.mark.parametrize(("T", "count"), [(1000, 2), (1000, 20), (1000, 999), (20, 7), (4000, 50)])
def test_each_part_of_the_schedule_gives_a_timestep(T: int, count: int) -> None:  # noqa: N803
    chosen = stratified(T, count, seed=3)
    assert len(chosen) == len(set(chosen)) == count
    assert chosen[0] == T - 1
    assert list(chosen) == sorted(chosen, reverse=True)
    # Parts of (T-1) / (count-1) timesteps, one draw in each.
    width = (T - 1) / (count - 1)
    gaps = -np.diff([*chosen, -1])
    assert gaps.max() <= 2 * width + 1


def test_the_choice_follows_the_seed_alone() -> None:
    assert stratified(1000, 20, seed=1) == stratified(1000, 20, seed=1)
    assert stratified(1000, 20, seed=1) != stratified(1000, 20, seed=2)
    assert stratified(1000, 20, seed=2**64 - 1)


@pytest.mark.parametrize("count", [20, 21, 5000])
def test_all_of_a_short_schedule_is_taken(count: int) -> None:
    assert stratified(20, count, seed=0) == tuple(range(19, -1, -1))


def test_timesteps_that_training_never_saw_are_left_out() -> None:
    assert stratified(20, 50, seed=0, first=1) == tuple(range(19, 0, -1))
    assert min(min(stratified(20, 10, seed=s, first=1)) for s in range(200)) == 1


def test_one_timestep_is_the_first_and_none_is_refused() -> None:
    assert stratified(1000, 1, seed=0) == (999,)
    with pytest.raises(ValueError, match="the number of timesteps is 0"):
        stratified(1000, 0, seed=0)


def test_the_share_is_met_as_often_as_it_says() -> None:
    count, T = 30, 1000  # noqa: N806
    share = Sampled(seen=count, of=T, drawn=True).share
    assert share is not None
    assert share == pytest.approx(1 - 0.05 ** (1 / 29))
    # Faults at a share of the timesteps: scattered, and in one stretch.
    draw = np.random.default_rng(0)
    size = round(share * T)
    met = {"scattered": 0, "stretch": 0}
    trials = 2000
    for seed in range(trials):
        seen = set(stratified(T, count, seed=seed))
        start = int(draw.integers(0, T - size))
        met["scattered"] += bool(seen & set(draw.choice(T, size, replace=False).tolist()))
        met["stretch"] += bool(seen & set(range(start, start + size)))
    for name, times in met.items():
        assert times / trials > 0.94, name  # 95 %, less two deviations of so many trials


@pytest.mark.parametrize(
    ("sampled", "says"),
    [
        (Sampled(seen=1000, of=1000), "all 1000 timesteps"),
        (Sampled(seen=50, of=1000), "50 of 1000 timesteps, those that the loop visits"),
        (
            Sampled(seen=50, of=1000, recorded=True),
            "50 of 1000 timesteps, those that the trace holds",
        ),
        (
            Sampled(seen=50, of=1000, drawn=True),
            "50 of 1000 timesteps; a fault at 5.9% of them or more is met with 95% confidence",
        ),
    ],
)
def test_what_was_looked_at_is_said(sampled: Sampled, says: str) -> None:
    assert sampled.says == says


def test_confidence_is_claimed_for_a_draw_alone() -> None:
    spec = tiny_spec(timesteps=100)
    drawn = Recipe(seed=4, steps=drawn_steps(spec, 10, seed=4))
    assert looked_at(10, drawn, spec).share is not None
    by_hand = Recipe(seed=4, steps=tuple(range(99, 89, -1)))
    assert looked_at(10, by_hand, spec).share is None
    kept = looked_at(5, drawn, spec, recorded=True)  # by a trace
    assert kept.says == "5 of 100 timesteps, those that the trace holds"
    visited = looked_at(10, Recipe(steps=10), spec, recorded=True)
    assert visited.says == "10 of 100 timesteps, those that the loop visits"


def test_a_network_is_asked_where_it_was_trained() -> None:
    spec = replace(tiny_spec(timesteps=20), first_timestep=1)
    assert drawn_steps(spec, 50, seed=0) == tuple(range(19, 0, -1))
