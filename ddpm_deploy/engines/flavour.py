"""TensorRT and TensorRT-RTX: two modules with one programming interface."""

from __future__ import annotations

import importlib
import re
from importlib import util
from pathlib import Path
from types import ModuleType

from ddpm_deploy.engines.plan import LABELS, Flavour
from ddpm_deploy.errors import MissingDependencyError

EXTRAS = {"tensorrt": "tensorrt", "tensorrt_rtx": "rtx"}


def installed() -> list[Flavour]:
    """Returns the flavours whose packages are there, without importing them."""
    flavours: list[Flavour] = ["tensorrt", "tensorrt_rtx"]
    return [flavour for flavour in flavours if util.find_spec(flavour) is not None]


def installed_version(flavour: Flavour) -> str | None:
    """Returns an installed flavour's version without importing it; None where nothing tells.

    It is the literal in the file that gives the module its `__version__`. A distribution's metadata
    would do for wheels, but JetPack's packages need not carry any.
    """
    for module in (flavour, f"{flavour}_bindings"):
        spec = util.find_spec(module)
        if spec is None or spec.origin is None:
            continue
        text = Path(spec.origin).read_text(encoding="utf-8", errors="replace")
        if found := re.search(r"^__version__\s*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE):
            return found[1]
    return None


def load(flavour: Flavour) -> ModuleType:
    """Imports a flavour.

    Raises:
        MissingDependencyError: It is not installed, or its libraries cannot be loaded.
    """
    require(flavour)
    try:
        return importlib.import_module(flavour)
    except ImportError as error:
        raise MissingDependencyError(
            f"{LABELS[flavour]} is installed, but cannot be loaded: {error}",
            hint="See ddpm-deploy doctor.",
        ) from error


def require(flavour: Flavour) -> None:
    """Raises MissingDependencyError where a flavour is not installed; imports nothing."""
    if flavour not in installed():
        raise MissingDependencyError(
            f"{LABELS[flavour]} is needed here, and the module {flavour} is not installed.",
            hint=_how_to_install(EXTRAS[flavour]),
        )


def _how_to_install(extra: str) -> str:
    if extra == "rtx":
        return "pip install 'ddpm-deploy[rtx]'"
    return (
        "pip install 'ddpm-deploy[tensorrt]'; on a Jetson it comes with JetPack: make the "
        "environment with python3 -m venv --system-site-packages, and in it "
        "pip install 'ddpm-deploy[jetson]'"
    )
