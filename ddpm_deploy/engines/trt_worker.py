"""The process that builds one plan: `python -m ddpm_deploy.engines.trt_worker FLAVOUR`.

It says a line of JSON when the runtime is loaded, reads one with the request, says one when the
graph is parsed and one when the plan is written; `failed` stands instead of what went wrong. It
ends when its input does, so it never outlives the process that started it.

Polygraphy makes the network, the profiles and the configuration alike for TensorRT 10, 11 and RTX.
Which of them it loads is decided by the environment variable POLYGRAPHY_USE_TENSORRT_RTX when it
is imported, which is one of the reasons for a process of its own.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import Counter
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO, get_args

from polygraphy.backend import tensorrt_rtx as polygraphy_rtx
from polygraphy.backend import trt as polygraphy_trt
from polygraphy.logger import G_LOGGER

from ddpm_deploy.engines.device import find_device
from ddpm_deploy.engines.flavour import LABELS, Flavour, load
from ddpm_deploy.engines.plan import Profile
from ddpm_deploy.errors import DDPMDeployError, EngineBuildError, MissingDependencyError

_KILL_ME_FIRST = "500"


def main() -> None:
    """Serves one build."""
    speak = _Speaker()
    (flavour,) = (f for f in get_args(Flavour) if f == sys.argv[1])
    with suppress(OSError):  # memory that runs out costs this process, not the one that started it
        Path("/proc/self/oom_score_adj").write_text(_KILL_ME_FIRST, encoding="ascii")
    try:
        trt = load(flavour)
        speak("ready", **_describe(trt, flavour))
        line = sys.stdin.readline()
        if not line:
            return
        threading.Thread(target=_leave_with_parent, daemon=True).start()
        request = json.loads(line)
        G_LOGGER.module_severity = G_LOGGER.WARNING
        started = time.perf_counter()
        network = _parse(trt, flavour, Path(request["graph"]))
        speak("parsed", layers=_layers(network[1]), inputs=_inputs(network[1]))
        config = _configure(trt, flavour, network, request)
        plan = polygraphy_trt.engine_bytes_from_network(network[:2], config=config)
        Path(request["plan"]).write_bytes(plan)
        if request["timing_cache"] and (measured := config.get_timing_cache()) is not None:
            Path(request["new_timing_cache"]).write_bytes(measured.serialize())
        speak("built", seconds=time.perf_counter() - started)
    except DDPMDeployError as error:
        missing = isinstance(error, MissingDependencyError)
        speak("failed", message=str(error), hint=error.hint, missing=missing)
    except Exception as error:  # noqa: BLE001  (whatever it is, the other process says it)
        speak("failed", message=f"{type(error).__name__}: {error}", hint="", missing=False)


class _Speaker:
    """Writes lines of JSON to what was stdout; what the libraries print goes to stderr."""

    def __init__(self) -> None:
        self._out: TextIO = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def __call__(self, kind: str, **values: Any) -> None:
        self._out.write(json.dumps({"kind": kind, **values}) + "\n")
        self._out.flush()


def _leave_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)  # the builder cannot be asked to stop


def _describe(trt: Any, flavour: Flavour) -> dict[str, Any]:
    device = None
    capabilities: list[str] = []
    if flavour == "tensorrt":
        found = find_device()
        device = None if found is None else asdict(found)
    else:
        names = [name[2:] for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
        capabilities = sorted((f"{n[:-1]}.{n[-1]}" for n in names), key=float)
    return {"version": trt.__version__, "device": device, "capabilities": capabilities}


def _parse(trt: Any, flavour: Flavour, graph: Path) -> tuple[Any, Any, Any]:
    """Returns builder, network and parser: the network lives as long as its parser.

    The parser's own errors are read here, since polygraphy only logs them.
    """
    builder, network = polygraphy_trt.create_network(strongly_typed=True)
    parser = trt.OnnxParser(network, polygraphy_trt.get_trt_logger())
    if parser.parse_from_file(str(graph)):
        return builder, network, parser
    said = []
    for number in range(parser.num_errors):
        error = parser.get_error(number)
        # TensorRT before 10 knows an operator's number alone.
        operator = error.node_operator() if hasattr(error, "node_operator") else ""
        name = error.node_name() if hasattr(error, "node_name") else ""
        where = f"{operator} {name!r}: " if operator else ""
        # Its `name` is no name in TensorRT 10.3; its text is `ErrorCode.UNSUPPORTED_NODE`.
        what = str(error.code()).rpartition(".")[2].lower().replace("_", " ")
        said.append(f"{where}{what} ({error.desc()})")
    raise EngineBuildError(
        f"{LABELS[flavour]} {trt.__version__} cannot parse the graph: " + "; ".join(said),
        hint="Export it with the default opset, which every TensorRT 10 reads: "
        "ddpm-deploy export CHECKPOINT -o unet.onnx",
    )


def _layers(network: Any) -> dict[str, int]:
    """Counts the layers by type and by what they give: `CONVOLUTION HALF`."""
    counts = Counter(
        f"{layer.type.name} {layer.get_output(0).dtype.name}"
        for layer in network
        if layer.num_outputs
    )
    return dict(sorted(counts.items()))


def _inputs(network: Any) -> dict[str, tuple[str, list[int]]]:
    entries = [network.get_input(number) for number in range(network.num_inputs)]
    return {entry.name: (entry.dtype.name, list(entry.shape)) for entry in entries}


def _configure(
    trt: Any, flavour: Flavour, network: tuple[Any, Any, Any], request: dict[str, Any]
) -> Any:
    chosen: dict[str, Any] = {
        "profiles": [_profile(network[1], Profile.parse(text)) for text in request["profiles"]],
        "builder_optimization_level": request["optimization_level"],
    }
    if request["workspace"] is not None:
        chosen["memory_pool_limits"] = {
            trt.MemoryPoolType.WORKSPACE: request["workspace"] * 2**20,
        }
    if flavour == "tensorrt_rtx":
        chosen["compute_capabilities"] = [
            tuple(map(int, text.split("."))) for text in request["compute_capabilities"]
        ] or None
        config = polygraphy_rtx.create_config_rtx(*network[:2], **chosen)
    else:
        if request["hardware_compatible"]:
            level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
            chosen["hardware_compatibility_level"] = level
        chosen["version_compatible"] = request["version_compatible"] or None
        cache = Path(request["timing_cache"])
        # Polygraphy leaves a lock beside a path, and none beside an open file.
        with cache.open("rb") if cache.is_file() else nullcontext() as measured:
            config = polygraphy_trt.create_config(
                *network[:2], load_timing_cache=measured, **chosen
            )
    # It is on by default, and would round float32 to 10 bits: what is float32 in the graph is so.
    config.clear_flag(trt.BuilderFlag.TF32)
    return config


def _profile(network: Any, batches: Profile) -> Any:
    """Returns polygraphy's profile: the first axis, where it is free, is the batch."""
    profile = polygraphy_trt.Profile()
    for number in range(network.num_inputs):
        entry = network.get_input(number)
        first, *rest = entry.shape
        if -1 in rest:
            raise EngineBuildError(
                f"The input {entry.name} is {tuple(entry.shape)}: an axis besides the batch is "
                "free.",
                hint="Export it again with fixed sizes: ddpm-deploy export CHECKPOINT",
            )
        if entry.name == "x" and first != -1 and not first == batches.least == batches.most:
            raise EngineBuildError(
                f"The graph takes batches of {first} alone; the profile is {batches}.",
                hint=f"Type --batch {first}, or export it with a free batch.",
            )
        sizes = (batches.least, batches.best, batches.most) if first == -1 else (first,) * 3
        profile.add(entry.name, *((size, *rest) for size in sizes))
    return profile


if __name__ == "__main__":
    main()
