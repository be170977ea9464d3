"""Every error that ddpm-deploy raises on purpose.

Each carries what happened with its values and, in `hint`, what to do or type next. The command
line prints both and exits with 2; a check that said no (`verify`, `doctor`) exits with 1 and
raises nothing.
"""

from __future__ import annotations


class DDPMDeployError(Exception):
    """Something a user can act on.

    Args:
        message: What happened, with the values.
        hint: What to do next; empty when there is nothing to add.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class SpecError(DDPMDeployError):
    """A model's spec is missing, damaged, or of a version that this release does not read."""


class CheckpointError(DDPMDeployError):
    """A checkpoint cannot be read, or is not a network that this release knows."""


class ExportError(DDPMDeployError):
    """A network could not be exported, or the exported graph is not the same function."""


class EngineError(DDPMDeployError):
    """An engine cannot be opened or run."""


class EngineBuildError(EngineError):
    """An engine could not be built."""


class PlanMismatchError(EngineError):
    """A plan is whole, but for another machine or another runtime: it must be built again.

    Args:
        message: What differs, with the values.
        command: What to type to build it again for this machine.
        first: What to do before, as a sentence; empty where the command is enough.
    """

    def __init__(self, message: str, *, command: str, first: str = "") -> None:
        super().__init__(message, hint=f"{first} Build it again: {command}".lstrip())
        self.command = command


class EngineInputError(EngineError):
    """An engine was called with arrays that it does not take."""


class ParityError(DDPMDeployError):
    """Two runs cannot be compared."""


class TraceError(ParityError):
    """A trace is missing, damaged, of a later version, or of another model."""


class BudgetError(ParityError):
    """A budget cannot be read."""


class RunError(DDPMDeployError):
    """A folder cannot take a run, or holds another one."""


class DataError(DDPMDeployError):
    """Data cannot be read, or do not fit the model."""


class TrainError(DDPMDeployError):
    """Training cannot start or go on."""


class MissingDependencyError(DDPMDeployError):
    """A package that this machine lacks is needed."""
