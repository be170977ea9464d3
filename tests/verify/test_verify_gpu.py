"""The curves of a GPU's arithmetics, in the order that their unit roundoff gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from ddpm_deploy import Recipe, open_engine
from ddpm_deploy.verify import Budget
from ddpm_deploy.verify.budget import Arithmetic
from ddpm_deploy.verify.sampled import stratified
from ddpm_deploy.verify.verification import verify
from tests.verify.conftest import DEMO

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device here"),
]


@contextmanager
def computing_in(arithmetic: Arithmetic) -> Iterator[None]:
    """Lets PyTorch compute in an arithmetic on the GPU."""
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(arithmetic)
    if half is not None:
        with torch.autocast("cuda", dtype=half):
            yield
        return
    torch.backends.cuda.matmul.allow_tf32 = arithmetic == "tf32"
    torch.backends.cudnn.allow_tf32 = arithmetic == "tf32"
    yield


def test_arithmetics_err_in_the_order_of_their_roundoff() -> None:
    reference = open_engine(DEMO, device="cpu")
    recipe = Recipe(sampler="ddpm", steps=stratified(1000, 40, seed=0))
    errors: dict[str, float] = {}
    arithmetics: tuple[Arithmetic, ...] = ("fp32", "tf32", "fp16", "bf16")
    for arithmetic in arithmetics:
        with open_engine(DEMO, device="cuda") as engine, computing_in(arithmetic):
            found = verify(engine, reference, recipe, range(2), budget=Budget.of(arithmetic))
        errors[arithmetic] = float(np.median([s.local.out.l2 for s in found.comparison.steps]))
        if arithmetic in {"fp32", "tf32"}:
            assert found.passed, found.comparison.failures
    # TF32 and fp16 have the same unit roundoff; autocast rounds more places than products.
    assert errors["fp32"] < errors["tf32"] / 10
    assert errors["tf32"] < errors["bf16"]
    assert errors["fp16"] < errors["bf16"] / 2
