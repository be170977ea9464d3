from __future__ import annotations

import itertools
import math
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ddpm_deploy import SeededNoise
from ddpm_deploy.arrays import Samples
from ddpm_deploy.noise import SCHEME, Ahead

SHAPE = (3, 8, 8)
RECORDED = [-0.147127926, 0.50211215, -1.09110105, 0.737587035]


def philox4x64(counter: tuple[int, ...], key: tuple[int, int]) -> list[int]:
    """Ten rounds of Philox4x64 in Python's integers (Salmon et al. 2011, section 3.3)."""
    mask = (1 << 64) - 1
    c, (k0, k1) = list(counter), key
    for _ in range(10):
        a, b = c[0] * 0xD2E7470EE14C6C93, c[2] * 0xCA5A826395121157
        c = [(b >> 64) ^ c[1] ^ k0, b & mask, (a >> 64) ^ c[3] ^ k1, a & mask]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
    return c


def by_hand(seed: int, image: int, step: int, size: int) -> list[float]:
    """The scheme as it is documented: Philox's words in pairs through Box and Muller's formula."""
    blocks = (philox4x64((n + 1, 0, step, 0), (seed, image)) for n in itertools.count())
    words = itertools.islice(itertools.chain.from_iterable(blocks), size + size % 2)
    normal: list[float] = []
    for first, second in zip(words, words, strict=True):
        u, v = ((word >> 11) + 1 for word in (first, second))
        radius = math.sqrt(-2 * math.log(u / 2**53))
        angle = 2 * math.pi * (v / 2**53)
        normal += [radius * math.cos(angle), radius * math.sin(angle)]
    return normal[:size]


def test_the_words_are_philox_s() -> None:
    """Known answers of the authors' own Random123 (kat_vectors, philox 4x64 10)."""
    assert philox4x64((0, 0, 0, 0), (0, 0)) == [
        0x16554D9ECA36314C,
        0xDB20FE9D672D0FDC,
        0xD7E772CEE186176B,
        0x7E68B68AEC7BA23B,
    ]


@pytest.mark.parametrize(
    ("seed", "image", "step"), [(0, 0, 0), (7, 3, 999), (2**64 - 1, 2**64 - 1, 2**63), (1, 0, 1)]
)
def test_the_draws_are_the_documented_scheme(seed: int, image: int, step: int) -> None:
    assert SCHEME == "philox4x64-box-muller-1"
    draws = SeededNoise(seed, [image], (5, 5, 3))(step)
    assert draws.dtype == np.float32
    expected = np.array(by_hand(seed, image, step, 75), dtype=np.float32)
    # NumPy's log, sin and cos may differ by an ulp of float64 from libm's, on other processors.
    np.testing.assert_array_max_ulp(draws.ravel(), expected, maxulp=1)


def test_the_draws_are_what_they_always_were() -> None:
    """Recorded; a change here changes every image that anybody drew, and needs a new SCHEME."""
    expected = np.array(by_hand(7, 0, 0, 4), dtype=np.float32)
    recorded = np.array(RECORDED, dtype=np.float32)
    np.testing.assert_array_max_ulp(expected, recorded, maxulp=1)
    np.testing.assert_array_max_ulp(SeededNoise(7, [0], (4,))(0)[0], recorded, maxulp=1)


@pytest.mark.parametrize(
    ("count", "shape"),
    [(1, (1,)), (3, (5, 5, 3)), (70, (1, 8, 8)), (40, (501,)), (2, (3, 64, 64))],
)
def test_the_draws_are_the_bits_of_the_formula_written_plainly(
    count: int, shape: tuple[int, ...]
) -> None:
    """Memory that is used again, and rows that are computed together, change no bit."""
    draws = SeededNoise(5, range(7, 7 + count), shape)(3)
    size = math.prod(shape)
    for image, drawn in zip(range(7, 7 + count), draws, strict=True):
        key = np.array([5, image], dtype=np.uint64)
        philox = np.random.Philox(counter=np.array([0, 0, 3, 0], dtype=np.uint64), key=key)
        words = philox.random_raw(size + size % 2)
        uniform = ((words >> np.uint64(11)) + np.uint64(1)).astype(np.float64) * 2.0**-53
        radius = np.sqrt(-2.0 * np.log(uniform[0::2]))
        angle = 2.0 * math.pi * uniform[1::2]
        normal = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
        assert drawn.tobytes() == normal.ravel()[:size].astype(np.float32).tobytes()


def test_several_steps_at_once_are_the_numbers_of_a_call_each() -> None:
    noise = SeededNoise(3, [4, 9], (5,))
    steps = [0, 7, 2, 2**40]
    np.testing.assert_array_equal(noise.of(steps), [noise(k) for k in steps])


@settings(max_examples=50, deadline=None)  # the machine may be busy
@given(
    st.integers(0, 2**64 - 1),
    st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=6),
    st.integers(0, 5000),
    st.randoms(use_true_random=False),
)
def test_an_image_s_noise_is_the_same_in_any_batch_order_and_subset(
    seed: int, images: list[int], step: int, random: object
) -> None:
    together = SeededNoise(seed, images, SHAPE)
    draws = together(step)
    order = list(range(len(images)))
    random.shuffle(order)  # type: ignore[attr-defined]
    shuffled = SeededNoise(seed, [images[i] for i in order], SHAPE)(step)
    for row, i in enumerate(order):
        assert shuffled[row].tobytes() == draws[i].tobytes()
        assert SeededNoise(seed, [images[i]], SHAPE)(step)[0].tobytes() == draws[i].tobytes()


def test_steps_can_be_drawn_in_any_order_and_again() -> None:
    noise = SeededNoise(3, range(4), SHAPE)
    forwards = [noise(k) for k in range(6)]
    for k in (5, 0, 3, 3, 1):
        np.testing.assert_array_equal(noise(k), forwards[k])
    # What was returned belongs to the caller.
    forwards[0][:] = 0
    assert noise(0).any()


def test_the_start_is_a_draw_like_the_others() -> None:
    noise = SeededNoise(3, range(2), SHAPE)
    x_T, first = noise(0), noise(1)  # noqa: N806
    assert x_T.shape == first.shape == (2, *SHAPE)
    assert not np.array_equal(x_T, first)


def test_a_longer_shape_begins_with_the_shorter_one() -> None:
    """The counter counts blocks within a draw, so the size has no part in the numbers."""
    short = SeededNoise(3, [9], (10,))(2)[0]
    long = SeededNoise(3, [9], (101,))(2)[0]
    np.testing.assert_array_equal(long[:10], short)
    assert SeededNoise(3, [9], (1,))(2).shape == (1, 1)


def test_the_draws_are_standard_normal() -> None:
    x = SeededNoise(0, range(64), (3, 32, 32))(0).ravel().astype(np.float64)
    n = x.size  # 196,608
    assert abs(x.mean()) < 4 / math.sqrt(n)
    assert abs(x.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs(stats.skew(x)) < 4 * math.sqrt(6 / n)
    assert abs(stats.kurtosis(x)) < 4 * math.sqrt(24 / n)
    assert stats.kstest(x, "norm").pvalue > 1e-3
    # The tails: of 196,608 numbers, 12.5 lie beyond 4.
    assert 2 <= int((np.abs(x) > 4).sum()) <= 28


@pytest.mark.parametrize("neighbours", ["steps", "images", "seeds", "numbers"])
def test_draws_of_neighbouring_keys_are_independent(neighbours: str) -> None:
    n = 256
    shape = (3, 16, 16)
    match neighbours:
        case "steps":
            noise = SeededNoise(0, [0], shape)
            rows = np.stack([noise(k)[0].ravel() for k in range(n)])
        case "images":
            rows = SeededNoise(0, range(n), shape)(0).reshape(n, -1)
        case "seeds":
            rows = np.stack([SeededNoise(s, [0], shape)(0).ravel() for s in range(n)])
        case _:
            rows = SeededNoise(0, range(n), shape)(0).reshape(n, -1).T[:n]
    size = rows.shape[1]
    every = np.asarray(np.corrcoef(rows.astype(np.float64)))
    correlation = every[np.triu_indices(n, 1)]
    # 32,640 correlations, each normal with deviation 1/√size: the largest is near 4.2 of them.
    assert np.abs(correlation).max() < 5.5 / math.sqrt(size)
    assert abs(correlation.std() * math.sqrt(size) - 1) < 0.05


def test_no_draw_is_infinite() -> None:
    """Of the 2^53 uniforms the least is 2^-53, not 0, so the radius is 8.6 at most."""
    assert math.isfinite(math.sqrt(-2 * math.log(2.0**-53)))
    assert np.isfinite(SeededNoise(1, range(100), (3, 32, 32))(5)).all()


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_outside_of_64_bits_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=rf"the seed is {seed}; it must lie in 0\.\.2\^64-1"):
        SeededNoise(seed, [0], SHAPE)
    with pytest.raises(ValueError, match=rf"the image index is {seed}; it must lie in"):
        SeededNoise(0, [1, seed], SHAPE)


# --- Ahead of the loop ---


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_noise_drawn_ahead_is_the_same_noise(threads: int) -> None:
    noise = SeededNoise(5, range(3), SHAPE)
    with Ahead(noise, range(1, 9), threads=threads) as ahead:
        for k in (*range(1, 9), 0, 3):  # those that were announced, and others
            np.testing.assert_array_equal(ahead(k), noise(k))


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_small_steps_are_drawn_together(threads: int) -> None:
    """Of 64 numbers each; a call for each would take ten times as long as the numbers."""
    noise = SeededNoise(5, [0], (1, 8, 8))
    steps = range(1, 3 * noise.together)
    assert noise.together > 100
    assert SeededNoise(5, range(64), (3, 32, 32)).together == 1
    with Ahead(noise, steps, threads=threads) as ahead:
        for k in (2, *steps, 2):  # 2 is asked for before its turn, and after it
            np.testing.assert_array_equal(ahead(k), noise(k))


def test_the_next_step_is_drawn_before_it_is_asked_for_and_no_more_than_that() -> None:
    drawn: list[int] = []
    second = threading.Event()

    def noise(step: int) -> Samples:
        drawn.append(step)
        if step == 2:
            second.set()
        return np.full((1, 1), step, dtype=np.float32)

    with Ahead(noise, range(1, 9)) as ahead:
        assert ahead(1) == 1
        assert second.wait(timeout=60)
    assert drawn == [1, 2]


def test_an_error_while_drawing_ahead_is_the_caller_s() -> None:
    def noise(step: int) -> Samples:
        raise MemoryError(f"step {step}")

    before = threading.active_count()
    with pytest.raises(MemoryError, match="step 2"), Ahead(noise, [2, 3]) as ahead:
        ahead(2)
    assert threading.active_count() == before


def test_no_image_has_no_noise() -> None:
    assert SeededNoise(0, [], (3, 4, 4))(0).shape == (0, 3, 4, 4)
