"""Training: Algorithm 1 of Ho et al. 2020 on ε, and the folder that a run lives in."""

from __future__ import annotations

from ddpm_deploy.train.processes import choose_device, choose_precision, is_leader, open_fabric
from ddpm_deploy.train.run import Outcome, Progress, SavedRun, claim, fit, read_run
from ddpm_deploy.train.settings import Settings, parse_widths
from ddpm_deploy.train.trainer import Trainer, check

__all__ = [
    "Outcome",
    "Progress",
    "SavedRun",
    "Settings",
    "Trainer",
    "check",
    "choose_device",
    "choose_precision",
    "claim",
    "fit",
    "is_leader",
    "open_fabric",
    "parse_widths",
    "read_run",
]
