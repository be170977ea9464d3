"""Verifications to write reports of."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from ddpm_deploy import open_engine
from ddpm_deploy.run import Recipe
from ddpm_deploy.verify.cause import Cause
from ddpm_deploy.verify.verification import Verification, verify
from tests.support import tiny_spec, write_graph

CAUSE = Cause(
    name="timestep-off-by-one",
    place="input",
    says="t is <one> too large & the schedule is not",
    evidence=("at t + 1 the error is 1e-7", "at t it is 1e-3"),
    mend="export it again",
)


def verified(folder: Path, *, bias: float = 0.0, causes: tuple[Cause, ...] = ()) -> Verification:
    """Verifies `my engine.onnx` against `unet.onnx`, which is without the bias."""
    deployed = open_engine(write_graph(folder / "my engine.onnx", tiny_spec(), bias=bias))
    reference = open_engine(write_graph(folder / "unet.onnx", tiny_spec()))
    recipe = Recipe(sampler="ddim", steps=4)
    command = ("ddpm-deploy", "verify", "-e", "my engine.onnx")
    found = verify(deployed, reference, recipe, range(2), command=command)
    return replace(found, causes=causes)


def renamed(found: Verification, path: str) -> Verification:
    """Calls the engine's file otherwise."""
    return replace(found, engine={**found.engine, "path": path}, command=("verify", path))


STRANGE = os.fsdecode(b"out/\xff \x00\x0b<&\"'>%: \xc3\xa9.onnx")
"""A name with bytes that are no UTF-8, and characters that XML and URIs do not have."""
