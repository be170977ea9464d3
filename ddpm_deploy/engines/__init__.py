"""Engines: a network as a function of arrays, one runtime a file."""

from __future__ import annotations

from ddpm_deploy.engines.base import Engine, open_engine

__all__ = ["Engine", "open_engine"]
