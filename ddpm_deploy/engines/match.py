"""Whether a plan runs here: its sidecar compared with the runtime and the device.

Nothing here loads a plan or a runtime. Each difference has a message of its own, since each has
another remedy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ddpm_deploy.capability import rtx_runs_on
from ddpm_deploy.engines.flavour import LABELS, Flavour, extra, installed, installed_version
from ddpm_deploy.engines.plan import PlanRecord, read_record, rebuild_command, this_platform
from ddpm_deploy.errors import EngineError, PlanMismatchError

AMPERE = "8.0"
"""The compute capability from which on a plan runs that names none."""


@dataclass(frozen=True, kw_only=True)
class Runtimes:
    """What could run a plan here.

    Attributes:
        versions: The installed flavours, and the version of each; None where nothing tells.
        platform: System and processor: `Linux x86_64`.
    """

    versions: Mapping[Flavour, str | None]
    platform: str

    @classmethod
    def here(cls) -> Runtimes:
        """Looks at this machine, importing nothing."""
        versions = {flavour: installed_version(flavour) for flavour in installed()}
        return cls(versions=versions, platform=this_platform())


def checked_record(plan: Path) -> PlanRecord:
    """Reads a plan's sidecar and compares it with the plan and with what is installed here.

    Raises:
        EngineError: Plan or sidecar is missing, damaged, or they do not belong together.
        PlanMismatchError: As from `check_runtime`.
    """
    record = read_record(plan)
    check_runtime(plan, record, Runtimes.here())
    return record


def check_runtime(plan: Path, record: PlanRecord, runtimes: Runtimes) -> None:
    """Compares a plan with what is installed.

    Raises:
        PlanMismatchError: It was built for another system or processor, by a flavour that is not
            here, or by a version that this one does not read.
    """
    again = rebuild_command(record, plan)
    if not _same_platform(record, runtimes.platform):
        raise PlanMismatchError(
            f"{plan} was built on {record.platform}; this is {runtimes.platform}.", command=again
        )
    if record.flavour not in runtimes.versions:
        here = " and ".join(_labelled(*pair) for pair in runtimes.versions.items())
        raise PlanMismatchError(
            f"{plan} was built by {record.runtime}, which is not installed here; "
            f"there is {here or 'no TensorRT'}.",
            command=again,
            first=f"Install {record.runtime}: {_install(record)}.",
        )
    version = runtimes.versions[record.flavour]
    if version is not None:
        check_version(plan, record, version)


def check_version(plan: Path, record: PlanRecord, version: str) -> None:
    """Compares a plan with its flavour's version: the same, or later where it was built for that.

    Raises:
        PlanMismatchError: It does not read this plan.
    """
    again = rebuild_command(record, plan)
    label = LABELS[record.flavour]
    if record.version_compatible and _numbers(version) >= _numbers(record.version):
        return
    if record.version_compatible:
        raise PlanMismatchError(
            f"{plan} runs in {record.runtime} and later; here is {label} {version}.", command=again
        )
    if version != record.version:
        raise PlanMismatchError(
            f"{plan} was built by {record.runtime} and loads in no other version; "
            f"here is {label} {version}.",
            command=again,
        )


def check_device(plan: Path, record: PlanRecord, name: str, capability: str) -> None:
    """Compares a plan with a GPU.

    Args:
        plan: For messages.
        record: Its sidecar.
        name: The GPU's name.
        capability: Its compute capability: `8.6`.

    Raises:
        PlanMismatchError: It is for GPUs of another compute capability, or for one other GPU.
        EngineError: Its flavour runs on no such GPU, so that no other build of it would either.
    """
    if record.flavour == "tensorrt_rtx" and not rtx_runs_on(capability):
        raise EngineError(
            f"{plan} is for {record.runtime}, which runs on no GPU of compute capability "
            f"{capability}, and this {name} is one; TensorRT runs on it.",
            hint=f"pip install 'ddpm-deploy[{extra('tensorrt')}]', and build with it: ddpm-deploy "
            f"build {record.graph} --{record.precision} --runtime tensorrt\n"
            f"Or run the graph on the CPU: --engine {record.graph}",
        )
    again = rebuild_command(record, plan)
    if record.flavour == "tensorrt_rtx":  # its plans are for the capabilities that are named
        again = f"{again} --compute-capability {capability}"
    # A hardware-compatible plan says where it was built, and runs from Ampere on.
    named = () if record.hardware_compatible else record.compute_capabilities
    if named and capability not in named:
        raise PlanMismatchError(
            f"{plan} is for compute capability {', '.join(named)}; this {name} has {capability}.",
            command=again,
        )
    if not named and _numbers(capability) < _numbers(AMPERE):
        raise PlanMismatchError(
            f"{plan} is for compute capability {AMPERE} and later; this {name} has {capability}.",
            command=again,
        )
    # TensorRT times kernels on one GPU; another model of the same capability has others. A plan of
    # TensorRT-RTX has no device: its kernels are chosen where it runs.
    if record.device and record.device != name and not record.hardware_compatible:
        raise PlanMismatchError(
            f"{plan} was built on {record.device} and runs there alone; this is {name}.",
            command=again,
        )


def _same_platform(record: PlanRecord, here: str) -> bool:
    """TensorRT-RTX's plans do not depend on the system, only on the processor."""
    if record.flavour == "tensorrt_rtx":
        return record.platform.split()[-1:] == here.split()[-1:]
    return record.platform == here


def _install(record: PlanRecord) -> str:
    """Returns what installs the very version that a plan wants."""
    if record.flavour == "tensorrt_rtx":
        return f"pip install tensorrt-rtx-cu13=={record.version}"
    return f"pip install tensorrt=={record.version}, or the JetPack that has it"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdecimal())


def _labelled(flavour: Flavour, version: str | None) -> str:
    return f"{LABELS[flavour]} {version or '(version unknown)'}"
