"""Runs a diffusion model trained in PyTorch on the edge, and proves that it is the same model.

A network is a function `engine(x, t) -> out`. A sampler is a table of numbers. One loop, `denoise`,
reads the table and calls the function.
"""

from __future__ import annotations

from ddpm_deploy._version import __version__
from ddpm_deploy.engines import Engine, open_engine
from ddpm_deploy.errors import DDPMDeployError
from ddpm_deploy.noise import SeededNoise
from ddpm_deploy.run import Recipe, sample
from ddpm_deploy.sampling import (
    Step,
    Transition,
    ddim,
    ddpm,
    denoise,
    dome272,
    guided,
    timesteps,
)
from ddpm_deploy.schedule import Schedule, cosine, linear, scaled_linear, sigmoid
from ddpm_deploy.solvers import dpmpp_2m
from ddpm_deploy.spec import Condition, ModelSpec

__all__ = [
    "Condition",
    "DDPMDeployError",
    "Engine",
    "ModelSpec",
    "Recipe",
    "Schedule",
    "SeededNoise",
    "Step",
    "Transition",
    "__version__",
    "cosine",
    "ddim",
    "ddpm",
    "denoise",
    "dome272",
    "dpmpp_2m",
    "guided",
    "linear",
    "open_engine",
    "sample",
    "scaled_linear",
    "sigmoid",
    "timesteps",
]
