from __future__ import annotations

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from ddpm_deploy.arrays import Array
from ddpm_deploy.data import ImageData
from ddpm_deploy.train.batches import Batch, Batches


@pytest.fixture
def batches(numbered: ImageData) -> Batches:
    return Batches(
        data=numbered, seed=5, batch=4, timesteps=50, flip=False, drop_label=0.1, classes=3
    )


def same(a: Batch, b: Batch) -> bool:
    assert a.y is not None
    assert b.y is not None
    pairs: list[tuple[Array, Array]] = [(a.x0, b.x0), (a.t, b.t), (a.eps, b.eps), (a.y, b.y)]
    return all(np.array_equal(x, y) for x, y in pairs)


def numbers(batch: Batch) -> list[int]:
    """The pictures' numbers, read off their left edge."""
    return [round((float(x) + 1) * 127.5) for x in batch.x0[:, 0, 0, 0]]


def test_a_batch_depends_on_seed_and_step_alone(batches: Batches) -> None:
    fresh = replace(batches)
    assert same(batches.at(7), fresh.at(7))
    assert not same(batches.at(7), batches.at(8))
    assert not same(batches.at(7), replace(batches, seed=6).at(7))


def test_a_stream_that_starts_later_goes_on_the_same(batches: Batches) -> None:
    whole = list(islice(batches.stream(0), 6))
    rest = list(islice(batches.stream(4), 2))
    assert [same(a, b) for a, b in zip(whole[4:], rest, strict=True)] == [True, True]


def test_processes_share_the_batch_of_one(batches: Batches) -> None:
    whole = batches.at(3)
    parts = [replace(batches, rank=rank, world=2).at(3) for rank in range(2)]
    assert np.array_equal(whole.x0, np.concatenate([p.x0 for p in parts]))
    assert np.array_equal(whole.t, np.concatenate([p.t for p in parts]))
    assert np.array_equal(whole.eps, np.concatenate([p.eps for p in parts]))
    assert whole.y is not None
    assert whole.y.tolist() == [y for p in parts if p.y is not None for y in p.y]


def test_every_picture_comes_once_an_epoch_in_another_order(batches: Batches) -> None:
    seen = [n for step in range(5) for n in numbers(batches.at(step))]  # 20 samples: two epochs
    first, second = seen[:10], seen[10:]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_labels_are_the_pictures_own_or_the_null_label(batches: Batches) -> None:
    many = [batches.at(step) for step in range(1000)]
    pairs = [(n, y) for b in many if b.y is not None for n, y in zip(numbers(b), b.y, strict=True)]
    dropped = [y for n, y in pairs if y != n % 3]
    assert set(dropped) == {3}
    # 4,000 draws at p = 0.1: five standard deviations are 0.024.
    assert abs(len(dropped) / len(pairs) - 0.1) < 0.024


def test_an_unconditional_run_has_no_labels(batches: Batches) -> None:
    assert replace(batches, classes=0).at(0).y is None


def test_flips_mirror_about_every_second_picture(batches: Batches) -> None:
    plain = [batches.at(step).x0 for step in range(250)]
    mirrored = [replace(batches, flip=True).at(step).x0 for step in range(250)]
    flips = 0
    for x, m in zip(np.concatenate(plain), np.concatenate(mirrored), strict=True):
        assert np.array_equal(m, x) or np.array_equal(m, x[:, :, ::-1])
        flips += not np.array_equal(m, x)
    # A tenth of the pictures is black on both sides; five standard deviations are 71.
    assert abs(flips - 450) < 75


def test_timesteps_are_uniform_and_noise_is_normal(batches: Batches) -> None:
    many = [batches.at(step) for step in range(1000)]
    t = np.concatenate([b.t for b in many])
    assert (t.min(), t.max()) == (0, 49)
    counts = np.bincount(t, minlength=50)
    assert ((counts - 80) ** 2 / 80).sum() < 100  # χ² of 49 degrees: 100 is beyond 1 in 10^4
    eps = np.stack([b.eps for b in many])
    assert abs(eps.mean()) < 0.01
    assert abs(eps.std() - 1) < 0.01
