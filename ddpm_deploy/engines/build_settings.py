"""What a TensorRT plan is built with: options, what a runtime refuses, and smaller builds."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ddpm_deploy.engines.flavour import SHORT_NAMES, Flavour
from ddpm_deploy.engines.plan import Profile
from ddpm_deploy.errors import EngineBuildError
from ddpm_deploy.precision import Precision

_SMALL_WORKSPACE = 256
_LOW_LEVEL = 1
_ONE = Profile(least=1, best=1, most=1)


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """What a plan is built with.

    Attributes:
        flavour: The runtime that builds it, and will run it.
        precision: Of the network's arithmetic.
        profiles: Batches that it takes.
        budget: Largest error of half precision, over the output's peak; of int8 the least decibels
            of a loop's images; the precision's own when None.
        data: Pictures whose noised versions the precision is measured on; the network's own samples
            when None.
        fuse_step: Whether the sampler's step stands behind the network.
        compute_capabilities: GPUs that it is for, such as `8.6`; empty for the flavour's default.
            TensorRT-RTX alone.
        workspace: Most scratch memory of one layer, in MiB; the device's memory when None.
        optimization_level: 0 builds fastest, 5 runs fastest; the runtime's own when None.
        timing_cache: Where measured timings are kept, for quicker builds. TensorRT alone.
        version_compatible: Whether later versions of TensorRT shall run it. TensorRT alone.
        hardware_compatible: Whether other GPUs, of Ampere and later, shall run it. TensorRT alone.

    Raises:
        EngineBuildError: The flavour has no such option.
    """

    flavour: Flavour
    precision: Precision
    profiles: tuple[Profile, ...]
    budget: float | None = None
    data: str | None = None
    fuse_step: bool = False
    compute_capabilities: tuple[str, ...] = ()
    workspace: int | None = None
    optimization_level: int | None = None
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False

    def __post_init__(self) -> None:
        if self.flavour == "tensorrt_rtx":
            self._check_rtx()
        elif self.compute_capabilities:
            raise EngineBuildError(
                "--compute-capability is for TensorRT-RTX: TensorRT measures its kernels on the "
                "GPU in this machine, and builds for that one.",
                hint="Leave it out and build on the device; or build ahead of time for GeForce "
                "and RTX GPUs: --runtime rtx",
            )

    def _check_rtx(self) -> None:
        if self.timing_cache:
            raise EngineBuildError(
                "--timing-cache is for TensorRT: TensorRT-RTX measures nothing while it builds. "
                "It compiles its kernels on the device when a plan is first opened.",
                hint="Leave --timing-cache out.",
            )
        if self.version_compatible:
            raise EngineBuildError(
                "--version-compatible is for TensorRT: TensorRT-RTX has no lean runtime, so its "
                "plans run in the very version that built them.",
                hint="Leave it out, and build again when the device's TensorRT-RTX changes.",
            )
        if self.hardware_compatible:
            raise EngineBuildError(
                "--hardware-compatible is for TensorRT: a TensorRT-RTX plan runs on GPUs of Ampere "
                "and later as it is.",
                hint="Leave it out; --compute-capability names single ones.",
            )
        for text in self.compute_capabilities:
            if not re.fullmatch(r"[1-9][0-9]?\.[0-9]", text):
                raise EngineBuildError(
                    f"{text!r} is no compute capability; one is written as 8.6.",
                    hint="NVIDIA lists them by GPU: https://developer.nvidia.com/cuda-gpus",
                )
        if self.precision == "bf16":
            refuse_bf16(self.compute_capabilities)

    @property
    def options(self) -> dict[str, Any]:
        """What the sidecar records besides its own fields."""
        return {
            "workspace": self.workspace,
            "optimization_level": self.optimization_level,
            "budget": self.budget,
            "data": self.data,
        }

    def command(self, graph: Path, output: Path) -> str:
        """Returns what to type for this build."""
        words = ["ddpm-deploy", "build", str(graph), f"--{self.precision}"]
        words += ["--runtime", SHORT_NAMES[self.flavour]]
        if self.fuse_step:
            words.append("--fuse-step")
        if self.budget is not None:
            kind = "psnr=" if self.precision == "int8" else ""
            words += ["--budget", f"{kind}{self.budget}"]
        if self.data is not None:
            words += ["--data", self.data]
        for profile in self.profiles:
            words += ["--batch", str(profile)]
        for capability in self.compute_capabilities:
            words += ["--compute-capability", capability]
        if self.workspace is not None:
            words += ["--workspace", str(self.workspace)]
        if self.optimization_level is not None:
            words += ["--optimization-level", str(self.optimization_level)]
        if self.timing_cache is not None:
            words += ["--timing-cache", str(self.timing_cache)]
        if self.version_compatible:
            words.append("--version-compatible")
        if self.hardware_compatible:
            words.append("--hardware-compatible")
        return shlex.join([*words, "-o", str(output)])

    def smaller(self, *, batch_alone: bool = False) -> list[Rung]:
        """Returns builds that need less memory, each giving up more than the one before.

        Args:
            batch_alone: Keep the other settings, which change what a build needs, not a plan.
        """
        rungs = []
        now = self
        # TensorRT-RTX measures no kernels, so that a limit and a level change nothing.
        if self.flavour == "tensorrt" and not batch_alone:
            if self.workspace is None or self.workspace > _SMALL_WORKSPACE:
                now = replace(now, workspace=_SMALL_WORKSPACE)
                rungs.append(Rung(now, "kernels that need much scratch memory"))
            if self.optimization_level is None or self.optimization_level > _LOW_LEVEL:
                now = replace(now, optimization_level=_LOW_LEVEL)
                rungs.append(Rung(now, "a search for the fastest kernels: it may run slower"))
        if self.profiles != (_ONE,):
            now = replace(now, profiles=(_ONE,))
            rungs.append(Rung(now, "batches: images are drawn one at a time"))
        return rungs


@dataclass(frozen=True)
class Rung:
    """A build that needs less memory.

    Attributes:
        settings: What to build with.
        gives_up: What it costs, besides what the rungs before cost.
    """

    settings: BuildSettings
    gives_up: str


def refuse_bf16(capabilities: Iterable[str]) -> None:
    """Raises EngineBuildError where one of these GPUs has no bfloat16."""
    older = [text for text in capabilities if int(text.split(".", maxsplit=1)[0]) < 8]
    if older:
        raise EngineBuildError(
            f"A GPU of compute capability {', '.join(older)} has no bfloat16; 8.0 is the first "
            "that has.",
            hint="Type --fp16 instead.",
        )
