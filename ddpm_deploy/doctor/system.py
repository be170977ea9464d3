"""What is read from a machine: its files, packages and GPUs, as one value."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from ddpm_deploy.doctor.jetson import Jetson, read_jetson

RUNTIMES = {
    # A module, and the packages that bring it; those of ONNX Runtime overwrite each other's files.
    "onnxruntime": (
        "onnxruntime",
        "onnxruntime-gpu",
        "onnxruntime-openvino",
        "onnxruntime-qnn",
        "onnxruntime-training",
    ),
    "openvino": ("openvino",),
    # Of TensorRT's, the first says its version: it requires the others.
    "tensorrt": (
        "tensorrt",
        *(f"tensorrt-cu{n}{part}" for n in (13, 12, 11) for part in ("", "-bindings")),
    ),
    "tensorrt_rtx": (
        "tensorrt-rtx",
        *(f"tensorrt-rtx-cu{n}{part}" for n in (13, 12) for part in ("", "-bindings")),
    ),
}
PATIENCE = 60  # seconds for one import; TensorRT's first one on a Jetson takes several


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU, as the CUDA driver describes it.

    Attributes:
        name: Its name.
        compute_capability: `8.7`.
        memory: In bytes; the whole machine's where the GPU is integrated.
        integrated: Whether it shares the CPU's memory.
    """

    name: str
    compute_capability: str
    memory: int
    integrated: bool


@dataclass(frozen=True, kw_only=True)
class Cuda:
    """What starting the CUDA driver gave.

    Attributes:
        version: The newest CUDA that the driver runs, `13.0`; empty where it did not start.
        gpus: The GPUs that it finds.
        error: Why it did not start.
    """

    version: str = ""
    gpus: tuple[Gpu, ...] = ()
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What importing a package gave.

    Attributes:
        version: Its own word on its version.
        providers: ONNX Runtime's execution providers.
        error: Why it cannot be imported; empty where it can.
    """

    version: str = ""
    providers: tuple[str, ...] = ()
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """An installed package.

    Attributes:
        name: Normalized: `onnxruntime-gpu`.
        version: Its version.
        folder: The folder on Python's path that holds it.
        wheel: What its WHEEL file says; empty where it came otherwise.
    """

    name: str
    version: str
    folder: str
    wheel: str

    @property
    def is_of_the_system(self) -> bool:
        """Whether a Debian package brought it."""
        return re.fullmatch(r"/usr/lib/python3[.\d]*/dist-packages", self.folder) is not None


@dataclass(frozen=True, kw_only=True)
class System:
    """A machine, as one Python on it sees it. Paths are the machine's own.

    Attributes:
        root: Where the machine's `/` is: elsewhere in tests.
        python: The version of Python.
        platform: The operating system, in words.
        processor: `x86_64` or `aarch64`.
        cores: CPU cores.
        free_disk: Bytes free in the current folder.
        prefix: Folder of the Python environment.
        path: Where Python looks for packages.
        cuda: What the CUDA driver says.
        imports: What came of importing each runtime that is installed.
    """

    root: Path = Path("/")
    python: str
    platform: str
    processor: str
    cores: int
    free_disk: int
    prefix: str
    path: tuple[str, ...]
    cuda: Cuda = field(default_factory=Cuda)
    imports: Mapping[str, Imported] = field(default_factory=dict)

    def read(self, path: str) -> str:
        """Returns a file's text; empty where it is missing or may not be read."""
        try:
            return self._at(path).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""

    @cached_property
    def jetson(self) -> Jetson | None:
        """The Jetson that this is, if it is one."""
        return read_jetson(self.read("/etc/nv_tegra_release"), self.read("/proc/device-tree/model"))

    @property
    def driver(self) -> str:
        """The version of the NVIDIA kernel driver, `580.95.05`; empty where there is none."""
        found = re.search(
            r"NVRM version:.*?\s(\d+\.[\d.]+)\s", self.read("/proc/driver/nvidia/version")
        )
        return found.group(1) if found else ""

    def memory(self, what: str = "MemTotal") -> int | None:
        """Returns a line of /proc/meminfo in bytes; None where there is no such file."""
        found = re.search(rf"^{what}:\s+(\d+) kB", self.read("/proc/meminfo"), re.MULTILINE)
        return int(found.group(1)) * 1024 if found else None

    @cached_property
    def cpu(self) -> str:
        """The CPU's name, as it says it itself; empty where it does not, as on ARM."""
        found = re.search(r"^model name\s*:\s*(.+)$", self.read("/proc/cpuinfo"), re.MULTILINE)
        return found.group(1).strip() if found else ""

    def physical_cores(self, allowed: Collection[int]) -> int:
        """Counts cores, of which one may run two threads, that are units of arithmetic.

        Args:
            allowed: Numbers of the processors that may be used.
        """
        cores = set()
        for text in self.read("/proc/cpuinfo").split("\n\n"):
            said = dict(re.findall(r"^([\w ]+?)\s*:\s*(.*)$", text, re.MULTILINE))
            number = said.get("processor", "")
            if number.isdecimal() and int(number) in allowed:
                cores.add((said.get("physical id"), said.get("core id", number)))
        return len(cores) or len(allowed)

    @property
    def is_isolated(self) -> bool:
        """Whether this is a virtual environment that hides the system's packages."""
        configuration = self.read(f"{self.prefix}/pyvenv.cfg").lower()
        return bool(re.search(r"include-system-site-packages\s*=\s*false", configuration))

    @cached_property
    def distributions(self) -> dict[str, Distribution]:
        """The installed packages by name; of two, the one that Python finds."""
        found: dict[str, Distribution] = {}
        for folder in self.path:
            for each in self._installed(folder):
                found.setdefault(each.name, each)
        return found

    def all_of(self, module: str) -> list[Distribution]:
        """Returns the packages that bring a runtime: of TensorRT's, which belong together, one."""
        there = [self.distributions[n] for n in RUNTIMES[module] if n in self.distributions]
        there.sort(key=lambda each: self.path.index(each.folder))
        return there if module == "onnxruntime" else there[:1]

    def find(self, module: str) -> Distribution | None:
        """Returns the package that brings a runtime, as Python finds it."""
        return next(iter(self.all_of(module)), None)

    def runs(self, module: str) -> str:
        """Returns the version of a runtime that can be imported; empty for one that cannot."""
        imported, found = self.imports.get(module), self.find(module)
        if imported is None or imported.error:
            return ""
        return imported.version or (found.version if found else "of unknown version")

    def system_tensorrt(self) -> Distribution | None:
        """Returns the TensorRT that JetPack or a Debian package put beside the system's Python."""
        for folder in sorted(self._at("/usr/lib").glob("python3*/dist-packages")):
            for each in self._installed(f"/usr/lib/{folder.relative_to(self._at('/usr/lib'))}"):
                if each.name == "tensorrt":
                    return each
        return None

    def _installed(self, folder: str) -> Iterator[Distribution]:
        if not folder:
            return  # the current folder, where nothing is installed
        for each in metadata.distributions(path=[str(self._at(folder))]):
            name = each.metadata["Name"]
            if name:  # a folder that a failed removal left behind has none
                yield Distribution(
                    name=re.sub(r"[-_.]+", "-", name).lower(),
                    version=each.version,
                    folder=folder,
                    wheel=each.read_text("WHEEL") or "",
                )

    def _at(self, path: str) -> Path:
        return self.root / path.lstrip("/")


def read_system(runtimes: Iterable[str] = RUNTIMES) -> System:
    """Reads this machine; opens the CUDA driver and each runtime in a process of its own.

    Args:
        runtimes: The packages to import if they are installed.
    """
    there = [name for name in runtimes if PathFinder.find_spec(name, sys.path) is not None]
    # All begin before the first is waited for: together they take as long as the slowest.
    started = {name: _start(name) for name in ["cuda", *there]}
    answers = {name: _answer(process) for name, process in started.items()}
    cuda = answers.pop("cuda")
    return System(
        python=platform.python_version(),
        platform=platform.platform(),
        processor=platform.machine(),
        cores=os.cpu_count() or 1,
        free_disk=shutil.disk_usage(Path.cwd()).free,
        prefix=sys.prefix,
        path=tuple(sys.path),
        cuda=Cuda(
            version=cuda.get("cuda", ""),
            gpus=tuple(Gpu(**each) for each in cuda.get("gpus", ())),
            error=cuda.get("error", ""),
        ),
        imports={
            name: Imported(
                version=answer.get("version", ""),
                providers=tuple(answer.get("providers", ())),
                error=answer.get("error", ""),
            )
            for name, answer in answers.items()
        },
    )


def _start(what: str) -> subprocess.Popen[str]:
    probe = Path(__file__).with_name("probe.py")
    return subprocess.Popen(  # noqa: S603  (this Python, a file of ours)
        [sys.executable, "-I", str(probe), what, json.dumps(sys.path)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # where runtimes warn of what the answer says
        text=True,
    )


def _answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    with process:
        try:
            out, _ = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            return {"error": f"did not answer within {PATIENCE} s"}
        except BaseException:  # Ctrl-C: do not wait for one that hangs
            process.kill()
            raise
    if process.returncode < 0:
        return {"error": f"crashes with {signal.Signals(-process.returncode).name}"}
    try:
        answer = json.loads(out.splitlines()[-1])  # libraries may print lines before it
    except (IndexError, json.JSONDecodeError):
        return {"error": f"ends its process with code {process.returncode}"}
    return dict(answer)
