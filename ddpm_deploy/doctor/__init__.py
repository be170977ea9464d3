"""What a machine can do: its packages, the commands that they allow, and what is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from ddpm_deploy.doctor.abilities import (
    EXPORT_PACKAGES,
    PLAN_PACKAGES,
    TRAIN_PACKAGES,
    Ability,
    abilities,
)
from ddpm_deploy.doctor.findings import Finding, findings
from ddpm_deploy.doctor.system import RUNTIMES, Distribution, System, read_system

__all__ = ["Ability", "Finding", "Package", "Report", "System", "examine", "machine", "read_system"]

PACKAGES = dict.fromkeys(("numpy", *PLAN_PACKAGES, *EXPORT_PACKAGES, *TRAIN_PACKAGES))


@dataclass(frozen=True, kw_only=True)
class Package:
    """A package.

    Attributes:
        name: Its name in the registry.
        version: Its version; empty where it is not installed.
        detail: What else there is to say: providers, or the folder of the system's TensorRT.
    """

    name: str
    version: str
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the doctor has to say.

    Attributes:
        machine: See `machine`.
        packages: What is installed, and what is not.
        commands: What the commands can do here.
        findings: What is wrong.
    """

    machine: dict[str, Any]
    packages: tuple[Package, ...]
    commands: tuple[Ability, ...]
    findings: tuple[Finding, ...]

    @property
    def can_run(self) -> bool:
        """Whether some engine can run here."""
        return any(each.ok for each in self.commands if each.command.startswith("sample"))

    @property
    def ok(self) -> bool:
        """Whether some engine can run here, and nothing is wrong."""
        return self.can_run and not self.findings

    def as_json(self) -> dict[str, Any]:
        """Returns the report in JSON's types."""
        return {**asdict(self), "can_run": self.can_run, "ok": self.ok}


def examine(system: System | None = None) -> Report:
    """Examines a machine.

    Args:
        system: The machine; this one if left out, which takes a second or two.
    """
    system = system or read_system()
    return Report(
        machine=machine(system),
        packages=tuple(_packages(system)),
        commands=tuple(abilities(system)),
        findings=tuple(findings(system)),
    )


def machine(system: System | None = None) -> dict[str, Any]:
    """Describes a machine, or this one: names, versions, cores, memory in bytes; JSON's types."""
    system = system or read_system(runtimes=())
    jetson = system.jetson
    return {
        "platform": system.platform,
        "processor": system.processor,
        "cpu": system.cpu,
        "python": system.python,
        "cores": system.cores,
        "memory": system.memory(),
        "memory_available": system.memory("MemAvailable"),
        "free_disk": system.free_disk,
        "jetson": jetson and {**asdict(jetson), "jetpack": jetson.jetpack},
        "driver": system.driver,
        "cuda": system.cuda.version,
        "cuda_error": system.cuda.error,
        "gpus": [asdict(gpu) for gpu in system.cuda.gpus],
    }


def _packages(system: System) -> Iterator[Package]:
    for module in RUNTIMES:
        installed = system.all_of(module)
        for each in installed:
            yield Package(
                name=each.name, version=each.version, detail=_detail(system, module, each)
            )
        if not installed:
            yield Package(name=module.replace("_", "-"), version="")
    for name in PACKAGES:
        found = system.distributions.get(name)
        yield Package(name=name, version=found.version if found else "")


def _detail(system: System, module: str, found: Distribution) -> str:
    imported, details = system.imports.get(module), []
    if imported and imported.error:
        details.append("cannot be imported")
    elif imported and imported.providers and len(system.all_of(module)) == 1:
        details.append(", ".join(p.removesuffix("ExecutionProvider") for p in imported.providers))
    if found.is_of_the_system:
        details.append(f"in {found.folder}")
    return ", ".join(details)
