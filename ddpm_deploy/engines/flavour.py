"""TensorRT and TensorRT-RTX: two modules with one programming interface."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Literal

from ddpm_deploy.errors import MissingDependencyError

Flavour = Literal["tensorrt", "tensorrt_rtx"]
"""The Python module that builds and runs a plan; neither reads the other's."""

LABELS: Mapping[Flavour, str] = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
"""What its maker calls it."""

SHORT_NAMES: Mapping[Flavour, str] = {"tensorrt": "tensorrt", "tensorrt_rtx": "rtx"}
"""What to type after `--runtime`, and the extra that brings it."""

JETSON = Path("/etc/nv_tegra_release")
"""A file that every Jetson has, and nothing else."""

_GET_RTX = """\
For a GeForce or RTX GPU, or to build ahead of time without a GPU:
  pip install 'ddpm-deploy[rtx]'"""
_GET_TENSORRT = """\
For a data-centre GPU, on the machine that has it:
  pip install 'ddpm-deploy[tensorrt]'
For a Jetson, on the Jetson, whose JetPack brings TensorRT:
  python3 -m venv --system-site-packages .venv
  .venv/bin/pip install 'ddpm-deploy[jetson]'"""


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
            hint=_GET_TENSORRT if flavour == "tensorrt" else "pip install 'ddpm-deploy[rtx]'",
        )


def require_any() -> list[Flavour]:
    """Returns the installed flavours.

    Raises:
        MissingDependencyError: There is none; the hint says which to install on which machine.
    """
    flavours = installed()
    if not flavours:
        raise MissingDependencyError(
            "A plan is built by TensorRT, and neither TensorRT nor TensorRT-RTX is installed.",
            hint=f"{_GET_RTX}\n{_GET_TENSORRT}\n"
            "Without any of these, ddpm-deploy build makes an ONNX Runtime engine.",
        )
    return flavours


def extra(flavour: Flavour) -> str:
    """Returns the extra with what a flavour needs besides; JetPack's TensorRT is not PyPI's."""
    return "jetson" if flavour == "tensorrt" and JETSON.is_file() else SHORT_NAMES[flavour]
