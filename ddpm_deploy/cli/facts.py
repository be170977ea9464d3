"""What `inspect` tells of each kind of file, as JSON and as lines."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm_deploy.cli.common import size
from ddpm_deploy.errors import DDPMDeployError, EngineError, ExportError
from ddpm_deploy.precision import METADATA_KEY as PRECISION_KEY
from ddpm_deploy.precision import read_precision
from ddpm_deploy.runtime import METADATA_KEY as RUNTIME_KEY
from ddpm_deploy.runtime import RuntimeRecord, read_runtime
from ddpm_deploy.spec import METADATA_KEY, ModelSpec

if TYPE_CHECKING:
    from ddpm_deploy.engines.plan import PlanRecord
    from ddpm_deploy.export.describe import GraphDescription

Rows = list[tuple[str, str]]

_PRECISIONS = {"HALF": "fp16", "BF16": "bf16", "FLOAT": "fp32"}
"""TensorRT's words for what a layer gives, and ours."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a file says it is.

    Attributes:
        kind: In words.
        spec: What the network is; None where the file does not say.
        data: What goes into the JSON besides: its types.
        rows: What goes into the table besides.
        command: What to type to make it again; empty where nothing says.
        missing: What this machine lacks to say more, and what to type; empty where nothing is.
    """

    kind: str
    spec: ModelSpec | None
    data: Mapping[str, Any]
    rows: Rows
    command: str = ""
    missing: str = ""


def checkpoint_facts(file: Path, **said: Any) -> Facts:
    """Reads a checkpoint; arguments and errors as `load_network`."""
    from ddpm_deploy.cli.describe_checkpoint import facts_rows
    from ddpm_deploy.engines.base import needs

    with needs("torch", extra="export"):
        from ddpm_deploy.model import load_network
    loaded = load_network(file, **said)
    data = {
        "kind": "checkpoint",
        "engine": "torch CPU",
        "fused": False,
        "precision": "fp32",
        "facts": [asdict(fact) for fact in loaded.facts],
    }
    rows = [
        ("found", f"{name}: {value} ({source})")
        for name, value, source, _ in facts_rows(loaded.facts)
        if source != "ASSUMED"
    ]
    rows += [
        ("assumed", f"{name}: {value} ({option})")
        for name, value, source, option in facts_rows(loaded.facts)
        if source == "ASSUMED"
    ]
    return Facts(kind="checkpoint, for torch CPU", spec=loaded.spec, data=data, rows=rows)


def plan_facts(file: Path) -> Facts:
    """Reads a plan's sidecar; the plan is compared with it, and not loaded.

    Raises:
        EngineError: Plan or sidecar is missing, damaged, or they do not belong together.
    """
    from ddpm_deploy.cli.plan import duration, where
    from ddpm_deploy.engines.plan import read_record

    record = read_record(file)
    refused = _refusal(file, record)
    told = json.loads(record.to_json())
    del told["spec"]
    rows: Rows = [
        ("runs", where(record)),
        ("runs here", "yes" if refused is None else f"no: {refused}"),
        ("batches", ", ".join(_batches(p.least, p.best, p.most) for p in record.profiles)),
        _step_row(fused=record.fused_step),
        *_precision_rows(record.precision, record.precision_groups),
        *_layer_rows(record.layers),
    ]
    if record.memory:
        rows.append(("memory", f"about {size(record.memory)} at batch {record.largest_batch}"))
    rows.append(("graph", f"{record.graph}, SHA-256 {record.graph_sha256[:12]}…"))
    rows.append(("built", f"in {duration(record.seconds)} on {record.platform} by {record.tool}"))
    return Facts(
        kind=f"plan of {record.runtime}",
        spec=record.spec,
        data={
            "kind": "plan",
            "fused": record.fused_step,
            "precision": record.precision,
            "precision_groups": dict(record.precision_groups),
            "runs_here": refused is None,
            "refusal": "" if refused is None else str(refused),
            "hint": "" if refused is None else refused.hint,
            "plan": told,
        },
        rows=rows,
        command=record.command,
    )


def _refusal(plan: Path, record: PlanRecord) -> DDPMDeployError | None:
    """Returns why a plan does not run here, as far as that is known without loading it."""
    from ddpm_deploy.engines.device import find_device
    from ddpm_deploy.engines.match import Runtimes, check_device, check_runtime

    try:
        check_runtime(plan, record, Runtimes.here())
        device = find_device()
        if device is None:
            return EngineError("There is no NVIDIA GPU here, or no driver for it.")
        check_device(plan, record, device.name, device.compute_capability)
    except DDPMDeployError as error:
        return error
    return None


def _batches(least: int, best: int, most: int) -> str:
    return str(best) if least == most else f"{least} to {most}, fastest at {best}"


def _layer_rows(layers: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """Yields TensorRT's layers, those of one type in a row, the most frequent first."""
    by_type: dict[str, Counter[str]] = {}
    for name, number in layers.items():
        kind, _, given = name.rpartition(" ")
        counted = by_type.setdefault(_PRECISIONS.get(given, given.lower()), Counter())
        counted[kind.lower().replace("_", " ")] += number
    first = [name for name in _PRECISIONS.values() if name in by_type]
    for name in dict.fromkeys([*first, *sorted(by_type)]):
        counts = ", ".join(f"{n} {kind}" for kind, n in by_type[name].most_common())
        yield f"{name} layers", counts


def _step_row(*, fused: bool) -> tuple[str, str]:
    return "step", "fused behind the network" if fused else "in NumPy"


def _precision_rows(precision: str, groups: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yields what is computed in what, and why."""
    yield "precision", precision
    for group, operators in groups.items():
        name, _, reason = group.partition(", ")
        yield f"in {name}", f"{reason}: {operators}" if reason else operators


def _runtime_rows(record: RuntimeRecord) -> Iterator[tuple[str, str]]:
    """Yields what an engine was built for, and what was measured where."""
    name = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}[record.runtime]
    rest = ", bfloat16 between int8 layers" if record.precision == "int8" else ""
    streams = f", {record.streams} streams" if record.streams > 1 else ""
    yield "built for", f"{name}{rest if record.arithmetic == 'bf16' else ''}{streams}"
    if record.best_batch is not None:
        yield "best batch", str(record.best_batch)
    if record.error is not None:
        yield "error", f"{record.error:.1e} of the output's peak from the graph's, when built"
    if record.psnr is not None:
        yield "likeness", f"{record.psnr:.1f} dB from float32 at the worst of a short loop's images"
    for runtime, each in record.milliseconds.items():
        yield "measured", f"{runtime}: {each:.2f} ms an image and step"
    if record.machine:
        yield "built on", ", ".join(f"{k} {v}" for k, v in record.machine.items())


def graph_facts(file: Path) -> Facts:
    """Reads an ONNX file, with onnx if it is here, else what ONNX Runtime tells.

    Raises:
        EngineError: It is no ONNX file.
        SpecError: The spec that it carries is damaged, or a later release's.
        MissingDependencyError: There is neither.
    """
    from ddpm_deploy.engines.base import needs
    from ddpm_deploy.fused import METADATA_KEY as STEP_KEY
    from ddpm_deploy.fused import is_fused
    from ddpm_deploy.run import default_batch

    rows: Rows = []
    data: dict[str, Any] = {"kind": "onnx"}
    kind, missing = "ONNX graph", ""
    model: Any = None  # onnx's, which a device may lack
    described: GraphDescription | None = None
    if util.find_spec("onnx") is not None:
        from ddpm_deploy.export.describe import describe_graph
        from ddpm_deploy.export.onnx_file import load_graph

        model = load_graph(file, weights=False)
        described = describe_graph(model)
        inputs, outputs, metadata = described.inputs, described.outputs, described.metadata
        kind += f", opset {described.opset}, IR version {described.ir_version}"
    else:
        with needs("onnxruntime", extra="cpu"):
            from ddpm_deploy.engines.ort import read_graph
        inputs, outputs, metadata = read_graph(file)
        missing = "opset, weights, attention and memory need onnx: pip install onnx"
    source = str(file)
    spec = None
    if METADATA_KEY in metadata:
        spec = ModelSpec.from_json(metadata[METADATA_KEY], source=source)
    fused = is_fused(metadata.get(STEP_KEY), source=source)
    said = read_precision(metadata.get(PRECISION_KEY), source=source)
    record = read_runtime(metadata.get(RUNTIME_KEY), source=source)
    for word, values in (("input", inputs), ("output", outputs)):
        rows += [(f"{word} {name}", text) for name, text in values.items()]
    if spec is not None:
        rows.append(_step_row(fused=fused))
        rows += _precision_rows(record.precision if record else said.precision, said.groups)
        if said.loop is not None:
            rows.append(("its loop", said.loop.in_words()))
    if record is not None:
        rows += _runtime_rows(record)
    data |= {
        "fused": fused,
        "precision": None if spec is None else (record or said).precision,
        "runtime": None if record is None else asdict(record),
        "precision_groups": dict(said.groups),
        "precision_loop": None if said.loop is None else asdict(said.loop),
        "inputs": dict(inputs),
        "outputs": dict(outputs),
    }
    if described is not None:
        batches = sorted({1} if spec is None else {1, default_batch(spec)})
        more, more_rows = _inside(model, described, batches)
        data |= more
        rows += more_rows
    return Facts(kind=kind, spec=spec, data=data, rows=rows, missing=missing)


def _inside(
    model: Any, described: GraphDescription, batches: list[int]
) -> tuple[dict[str, Any], Rows]:
    """Returns what only the nodes tell: operators, weights, attention, memory."""
    from ddpm_deploy.export.attention import find_attention
    from ddpm_deploy.export.memory import estimate_memory

    nodes = sum(described.operators.values())
    data: dict[str, Any] = {
        "opset": described.opset,
        "ir_version": described.ir_version,
        "producer": described.producer,
        "nodes": nodes,
        "operators": dict(described.operators),
        "weights": described.weights,
        "weight_bytes": described.weight_bytes,
        "external": list(described.external),
    }
    most = ", ".join(f"{n} {kind}" for kind, n in [*described.operators.items()][:6])
    rows: Rows = [
        ("nodes", f"{nodes}: {most}" + (", …" if len(described.operators) > 6 else "")),
        ("weights", f"{described.weights:,} numbers, {size(described.weight_bytes)}"),
    ]
    if described.external:
        rows.append(("also needs", ", ".join(described.external)))
    if described.producer:
        rows.append(("made by", described.producer))
    try:
        attentions = find_attention(model, batch=1)
        estimates = {batch: estimate_memory(model, batch=batch) for batch in batches}
    except ExportError as error:
        return data, [*rows, ("memory", f"not known: {error}")]
    data["attention"] = [asdict(attention) for attention in attentions]
    data["memory"] = [
        {"batch": batch, **asdict(estimate), "total": estimate.total}
        for batch, estimate in estimates.items()
    ]
    alike = Counter((a.heads, a.queries, a.keys, a.whole_bytes) for a in attentions)
    rows += [
        (
            "attention",
            f"{number} with {heads} head{'s' * (heads > 1)}, {queries} x {keys} scores each: "
            f"{size(matrix)} an image",
        )
        for (heads, queries, keys, matrix), number in alike.items()
    ]
    stored = " with attention's scores stored" if attentions else ""
    for batch, estimate in estimates.items():
        least = "more than" if estimate.unknown else "about"
        text = (
            f"{least} {size(estimate.total)} at batch {batch}{stored}: weights "
            f"{size(estimate.weights)}, activations {size(estimate.activations)}"
        )
        if estimate.unknown:
            text += f"; {len(estimate.unknown)} tensors, of unknown shape, are not counted"
        rows.append(("memory", text))
    return data, rows
