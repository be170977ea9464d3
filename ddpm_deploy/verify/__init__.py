"""Proof that a deployed loop is the trained model, at every timestep of it."""

from __future__ import annotations

from ddpm_deploy.verify.budget import Budget, Limit, read_budget
from ddpm_deploy.verify.compare import Check, Comparison, StepErrors, Verifier
from ddpm_deploy.verify.loops import Loop, engine_loop
from ddpm_deploy.verify.measures import Errors, PictureErrors
from ddpm_deploy.verify.trace import Trace, read_trace, record, write_trace

__all__ = [
    "Budget",
    "Check",
    "Comparison",
    "Errors",
    "Limit",
    "Loop",
    "PictureErrors",
    "StepErrors",
    "Trace",
    "Verifier",
    "engine_loop",
    "read_budget",
    "read_trace",
    "record",
    "write_trace",
]
