"""The sidecar of a TensorRT plan: what the plan is, and where it runs.

A plan has no room for metadata, and is executable code. So `unet.plan` comes with
`unet.plan.json`, and no byte of a plan is loaded before its sidecar was compared with it and with
the machine.
"""

from __future__ import annotations

import json
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

from ddpm_deploy.engines.flavour import LABELS, Flavour
from ddpm_deploy.errors import EngineError
from ddpm_deploy.files import sha256
from ddpm_deploy.precision import Precision
from ddpm_deploy.spec import ModelSpec

FORMAT = 1

_MOST = 2**63
"""Beyond any number of bytes or seconds."""


@dataclass(frozen=True, kw_only=True, order=True)
class Profile:
    """Batch sizes that a plan takes, and the one it is tuned for.

    Attributes:
        least: Smallest batch.
        best: The batch it is fastest at.
        most: Largest batch.

    Raises:
        ValueError: They are not 1 <= least <= best <= most.
    """

    least: int
    best: int
    most: int

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.best <= self.most:
            raise ValueError(f"a profile is MIN:OPT:MAX with 1 <= MIN <= OPT <= MAX, not {self}")

    @classmethod
    def parse(cls, text: str) -> Profile:
        """Reads `1:8:32`, or `8` for a plan of that one batch."""
        parts = text.split(":")
        if len(parts) not in {1, 3} or not all(p.isascii() and p.isdecimal() for p in parts):
            raise ValueError(
                f"a profile is MIN:OPT:MAX, such as 1:8:32, or one number, not {text!r}"
            )
        least, best, most = (int(p) for p in (parts if len(parts) == 3 else parts * 3))
        return cls(least=least, best=best, most=most)

    def __contains__(self, batch: int) -> bool:
        return self.least <= batch <= self.most

    def __str__(self) -> str:
        return f"{self.least}:{self.best}:{self.most}"


@dataclass(frozen=True, kw_only=True)
class PlanRecord:
    """What `unet.plan.json` says.

    Attributes:
        spec: What the network is.
        plan_sha256: Of the plan's bytes, in hexadecimal.
        plan_bytes: Its size.
        graph: Name of the ONNX file it was built from.
        graph_sha256: Of that file and of those that hold its weights, if there are any.
        flavour: `tensorrt` or `tensorrt_rtx`.
        version: Of the flavour, in full: a plan loads in no other.
        platform: `Linux x86_64`: system and processor it was built on.
        device: Name of the GPU it was built on; empty for a plan that was built ahead of time.
        compute_capabilities: Those it runs on, such as `8.6`; empty where the flavour's default
            stands, which for TensorRT-RTX is Ampere and everything later.
        profiles: Batches that it takes.
        precision: `fp16`, `bf16` or `fp32`.
        precision_groups: How many layers compute in what, and why: group to sentence.
        layers: How many layers of a kind TensorRT made of the graph: `CONVOLUTION HALF` to their
            number; the second word is the type of what they give.
        precision_error: Largest error of the mixed graph's output over its peak, as it was measured
            before the build; None where it was not.
        fused_step: Whether the transition stands behind the network: inputs `row` and `z`, output
            `x_s`.
        hardware_compatible: Whether it runs on other GPUs than `device`.
        version_compatible: Whether it runs in later versions than `version`.
        options: The other build settings that were chosen, for the same build again.
        memory: Estimated device memory of one call at the largest batch, in bytes.
        seconds: How long the build took.
        tool: The ddpm-deploy that built it.
        command: What to type to build it again.
    """

    spec: ModelSpec
    plan_sha256: str
    plan_bytes: int
    graph: str
    graph_sha256: str
    flavour: Flavour
    version: str
    platform: str
    device: str
    compute_capabilities: tuple[str, ...]
    profiles: tuple[Profile, ...]
    precision: Precision
    precision_groups: Mapping[str, str] = field(default_factory=dict)
    layers: Mapping[str, int] = field(default_factory=dict)
    precision_error: float | None = None
    fused_step: bool = False
    hardware_compatible: bool = False
    version_compatible: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    memory: int = 0
    seconds: float = 0.0
    tool: str = ""
    command: str = ""

    @property
    def runtime(self) -> str:
        """Flavour and version in words: `TensorRT-RTX 1.7.1.116`."""
        return f"{LABELS[self.flavour]} {self.version}"

    @property
    def largest_batch(self) -> int:
        """The most images that one call takes."""
        return max(profile.most for profile in self.profiles)

    def profile_for(self, batch: int) -> int | None:
        """Returns the profile's number that suits a batch best, None where none takes it.

        Of several, the one whose best batch is nearest.
        """
        fitting = [
            (abs(profile.best - batch), number)
            for number, profile in enumerate(self.profiles)
            if batch in profile
        ]
        return min(fitting)[1] if fitting else None

    def to_json(self) -> str:
        """Returns the sidecar's text."""
        plain = {**asdict(self), "spec": self.spec.to_dict()}
        plain["profiles"] = [str(profile) for profile in self.profiles]
        return json.dumps({"format": FORMAT, **plain}, indent=2) + "\n"


def this_platform() -> str:
    """Returns system and processor, as `PlanRecord.platform` has them: `Linux x86_64`."""
    return f"{platform.system()} {platform.machine()}"


def sidecar(plan: Path) -> Path:
    """Returns the sidecar's path: `unet.plan.json` for `unet.plan`."""
    return plan.with_name(plan.name + ".json")


def read_record(plan: Path) -> PlanRecord:
    """Reads a plan's sidecar and compares it with the plan's bytes, which it does not load.

    Raises:
        EngineError: Plan or sidecar is missing, damaged, of a later format, or they do not belong
            together.
    """
    if not plan.is_file():
        raise EngineError(f"There is no file {plan}.", hint=_first_build(plan))
    path = sidecar(plan)
    rebuild = f"Build it again: ddpm-deploy build --fp16 -o {plan}"
    if not path.is_file():
        raise EngineError(
            f"{plan} has no sidecar {path.name}. A plan is executable code, and nothing says "
            "what this one is.",
            hint=f"Copy {path.name} along with the plan. {rebuild}",
        )
    record = _parse(path)
    size = plan.stat().st_size
    if size != record.plan_bytes:
        raise EngineError(
            f"{plan} has {size:,} bytes; its sidecar says {record.plan_bytes:,}. It was cut short, "
            "or the sidecar belongs to another plan.",
            hint=f"Copy both files again. {rebuild_hint(record, plan)}",
        )
    digest = sha256(plan)
    if digest != record.plan_sha256:
        raise EngineError(
            f"{plan} is not the plan of {path.name}: its SHA-256 is {digest[:12]}…, the sidecar "
            f"says {record.plan_sha256[:12]}…. It was changed, or the sidecar belongs to another.",
            hint=f"Copy both files again. {rebuild_hint(record, plan)}",
        )
    return record


def rebuild_command(record: PlanRecord, plan: Path) -> str:
    """Returns what to type to build a plan again."""
    return record.command or f"ddpm-deploy build --fp16 -o {plan}"


def rebuild_hint(record: PlanRecord, plan: Path) -> str:
    """Returns the same as a sentence."""
    return f"Build it again: {rebuild_command(record, plan)}"


def _first_build(plan: Path) -> str:
    """Says how to make a plan that is missing, of the graph beside it where there is one."""
    for graph in (plan.with_suffix(".onnx"), plan.with_name("unet.onnx")):
        if graph.is_file():
            words = ["ddpm-deploy", "build", str(graph), "--fp16", "-o", str(plan)]
            return f"Build it first: {shlex.join(words)}"
    return "Build it first: ddpm-deploy build --fp16"


def _parse(path: Path) -> PlanRecord:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(data, ensure_ascii=False).encode()  # half of a surrogate pair cannot be printed
        version = data.pop("format")
        if not isinstance(version, int):
            raise TypeError("its format is no number")
        if version > FORMAT:
            raise EngineError(
                f"{path} is of format {version}; this release reads formats up to {FORMAT}.",
                hint="pip install --upgrade ddpm-deploy",
            )
        spec = ModelSpec.from_dict(data.pop("spec"), source=str(path))
        profiles = tuple(Profile.parse(text) for text in data.pop("profiles"))
        capabilities = _texts(data.pop("compute_capabilities"))
        record = PlanRecord(spec=spec, profiles=profiles, compute_capabilities=capabilities, **data)
        _check(record)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise EngineError(
            f"{path} is damaged ({error!r}), so nothing says what the plan beside it is.",
            hint="Copy plan and sidecar again, or build them again: ddpm-deploy build --fp16",
        ) from error
    return record


def _texts(value: Sequence[object]) -> tuple[str, ...]:
    if isinstance(value, str) or not all(isinstance(item, str) for item in value):
        raise TypeError(f"{value!r} is no list of texts")
    return tuple(str(item) for item in value)


def _check(record: PlanRecord) -> None:
    """Raises TypeError or ValueError where a field is not what it must be."""
    kinds: dict[str, tuple[type, ...]] = {
        "str": (str,),
        "int": (int,),
        "bool": (bool,),
        "float": (int, float),
        "float | None": (int, float, type(None)),
    }
    for name, kind in PlanRecord.__annotations__.items():
        value = getattr(record, name)
        wanted = kinds.get(kind)
        if wanted and (
            not isinstance(value, wanted) or (isinstance(value, bool) != (kind == "bool"))
        ):
            raise TypeError(f"{name} is {value!r}")
        if kind.startswith("Mapping") and not isinstance(value, dict):
            raise TypeError(f"{name} is {value!r}")
    if record.flavour not in get_args(Flavour):
        raise ValueError(f"flavour is {record.flavour!r}")
    if record.precision not in get_args(Precision):
        raise ValueError(f"precision is {record.precision!r}")
    if not all(isinstance(text, str) for text in record.precision_groups.values()):
        raise TypeError("precision_groups are no texts")
    if not all(isinstance(number, int) for number in record.layers.values()):
        raise TypeError("layers are no numbers")
    for name in ("plan_bytes", "memory", "seconds"):
        if not 0 <= getattr(record, name) < _MOST:  # not NaN either
            raise ValueError(f"{name} is out of range")
    if not record.command.isprintable():  # it is shown to be typed
        raise ValueError(f"command is {record.command!r}")
    if not record.profiles:
        raise ValueError("there is no profile")
