from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from ddpm_deploy.errors import SpecError
from ddpm_deploy.precision import (
    LoopRecord,
    PrecisionRecord,
    read_precision,
    to_bf16,
    to_fp16,
    to_tf32,
)


def test_a_graph_says_its_precision_or_is_float32() -> None:
    assert read_precision(None, source="g").precision == "fp32"
    said = PrecisionRecord(precision="bf16", groups={"bf16": "2 Conv"}, error=0.01)
    assert read_precision(said.to_json(), source="g") == said
    assert read_precision('{"precision": "fp16", "groups": {}}', source="g").error is None


def test_a_graph_says_what_its_loop_gave() -> None:
    loop = LoopRecord(
        psnr=36.25,
        budget=35,
        sampler="ddim",
        steps=50,
        images=2,
        seed=0,
        calibration="8 pictures",
    )
    said = PrecisionRecord(precision="int8", groups={"int8": "2 Conv"}, error=0.1, loop=loop)
    assert read_precision(said.to_json(), source="g") == said
    assert loop.in_words() == (
        "36.2 dB from float32 at the worst of 2 images after 50 ddim steps (seed 0); 35 dB were "
        "asked for; ranges from 8 pictures"
    )
    assert read_precision('{"precision": "int8"}', source="g").loop is None


@pytest.mark.parametrize(
    "damaged",
    [
        "",
        "[]",
        "{}",
        '{"precision": "int4"}',
        '{"precision": "int8", "loop": {"psnr": 30}}',
        '{"precision": "int8", "loop": 30}',
        '{"precision": 16}',
        '{"precision": "fp16", "groups": []}',
        '{"precision": "fp16", "groups": {"fp16": 2}}',
        '{"precision": "fp16", "error": "small"}',
    ],
)
def test_what_is_damaged_is_refused_and_not_taken_for_float32(damaged: str) -> None:
    with pytest.raises(SpecError, match="g says that it is in mixed precision, but not how"):
        read_precision(damaged, source="g")


def test_numbers_are_rounded_to_bf16_as_another_library_rounds_them() -> None:
    x = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    x[:4] = 0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8  # the last two lie between two neighbours
    assert np.array_equal(to_bf16(x), x.astype(ml_dtypes.bfloat16).astype(np.float32))
    assert to_bf16(np.array(1.003, np.float32)).shape == ()  # a constant of a graph


def test_numbers_are_rounded_to_tf32_s_ten_bits() -> None:
    ulp = 2.0**-10
    given = np.array([1 + ulp / 2, 1 + 3 * ulp / 2, 1 + 0.51 * ulp, -1 - 0.49 * ulp], np.float32)
    assert to_tf32(given).tolist() == [1, 1 + 2 * ulp, 1 + ulp, -1]


def test_fp16_ends_at_65504() -> None:
    assert to_fp16(np.array([65504, 65520, 2049], np.float32)).tolist() == [65504, np.inf, 2048]
