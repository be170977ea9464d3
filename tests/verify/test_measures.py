from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from ddpm_deploy.arrays import Array, Pixels
from ddpm_deploy.verify.measures import Errors, PictureErrors, ssim

DRAW = np.random.default_rng(0)


def samples(*shape: int) -> Array:
    return DRAW.standard_normal(shape).astype(np.float32)


def pixels(*shape: int) -> Pixels:
    return DRAW.integers(0, 256, shape).astype(np.uint8)


def test_equal_samples_have_no_error() -> None:
    x = samples(3, 2, 4, 4)
    assert Errors.between(x, x) == Errors(max=0.0, l2=0.0, cosine=1.0, psnr=float("inf"))


def test_errors_are_those_of_the_worst_image() -> None:
    wanted = np.array([[3.0, 4.0], [0.0, 2.0]], np.float32)
    given = np.array([[3.0, 4.0], [1.0, 2.0]], np.float32)
    found = Errors.between(given, wanted)
    assert found.max == 0.25  # of the peak of all images, which is 4
    assert found.l2 == pytest.approx(0.5)
    assert found.cosine == pytest.approx(2 / np.sqrt(5))
    # Peak 2 over a root mean square of 1/√2.
    assert found.psnr == pytest.approx(20 * np.log10(2 * np.sqrt(2)))


def test_opposite_samples_have_a_cosine_of_minus_one() -> None:
    x = samples(2, 5)
    assert Errors.between(-x, x).cosine == pytest.approx(-1)
    assert Errors.between(-x, x).l2 == pytest.approx(2)


def test_against_nothing_an_error_is_what_it_is() -> None:
    found = Errors.between(np.full((1, 4), 2, np.float32), np.zeros((1, 4), np.float32))
    assert (found.max, found.l2, found.cosine) == (2.0, 4.0, 0.0)
    assert found.psnr == -np.inf


def test_large_numbers_do_not_overflow() -> None:
    x = np.full((1, 4), 1e30, np.float32)
    assert Errors.between(2 * x, x).l2 == pytest.approx(1)


def scipy_ssim(x: Pixels, y: Pixels) -> float:
    """Wang et al. 2004 with SciPy's Gaussian filter, where its window lies inside."""

    def mean(a: Array) -> Array:
        blurred = ndimage.gaussian_filter(a, 1.5, radius=5, axes=(0, 1))
        return np.asarray(blurred[5:-5, 5:-5])

    a, b = x.astype(np.float64), y.astype(np.float64)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    values = (2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
    return float(values.mean())


@pytest.mark.parametrize("shape", [(32, 32, 3), (11, 40, 1), (17, 13, 4)])
def test_ssim_is_that_of_the_paper(shape: tuple[int, ...]) -> None:
    x = pixels(*shape)
    noisy = np.clip(x + DRAW.normal(0, 20, shape), 0, 255).astype(np.uint8)
    assert ssim(noisy, x) == pytest.approx(scipy_ssim(noisy, x), rel=1e-10)
    assert ssim(x, x) == pytest.approx(1)


def test_ssim_of_flat_pictures_has_a_closed_form() -> None:
    black, grey = (np.full((16, 16, 1), value, np.uint8) for value in (0, 100))
    c1 = (0.01 * 255) ** 2
    assert ssim(grey, black) == pytest.approx(c1 / (100**2 + c1))


@pytest.mark.parametrize("side", [1, 2, 8, 10])
def test_ssim_takes_pictures_smaller_than_its_window(side: int) -> None:
    x = pixels(side, side, 1)
    assert ssim(x, x) == pytest.approx(1)
    assert ssim(255 - x, x) < 1


def test_pictures_are_compared_in_levels() -> None:
    wanted = np.full((2, 4, 4, 1), 100, np.uint8)
    given = wanted.copy()
    given[0, 0, 0, 0] = 101
    given[1, :2] = 90
    found = PictureErrors.between(given, wanted)
    assert found.equal == (32 - 9) / 32
    assert found.close == (32 - 8) / 32
    assert found.largest == 10
    assert found.bias == (1 - 80) / 32
    assert found.psnr == pytest.approx(
        (10 * np.log10(255**2 * 16), 10 * np.log10(255**2 / 50)), rel=1e-12
    )
    assert len(found.ssim) == 2


def test_a_row_of_numbers_has_no_ssim() -> None:
    row = pixels(2, 1, 12, 1)
    assert PictureErrors.between(row, row).ssim == ()
