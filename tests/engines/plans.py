"""Sidecars and plans for tests; the plans' bytes are no plan of any runtime."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from ddpm_deploy.engines.plan import PlanRecord, Profile, sidecar
from tests.support import tiny_spec

BYTES = b"no runtime reads this" * 50


def record(**changes: Any) -> PlanRecord:
    """Returns what a sidecar of `BYTES` says, with some fields changed."""
    fields: dict[str, Any] = {
        "spec": tiny_spec(),
        "plan_sha256": hashlib.sha256(BYTES).hexdigest(),
        "plan_bytes": len(BYTES),
        "graph": "unet.onnx",
        "graph_sha256": "0" * 64,
        "flavour": "tensorrt",
        "version": "10.3.0",
        "platform": "Linux aarch64",
        "device": "Orin",
        "compute_capabilities": ("8.7",),
        "profiles": (Profile(least=1, best=8, most=8),),
        "precision": "fp16",
        "command": "ddpm-deploy build unet.onnx --fp16 -o unet.plan",
    }
    return PlanRecord(**(fields | changes))


def write_plan(path: Path, plan: PlanRecord | None = None, content: bytes = BYTES) -> Path:
    """Writes bytes and a sidecar that may or may not belong to them."""
    path.write_bytes(content)
    sidecar(path).write_text((plan or record()).to_json(), encoding="utf-8")
    return path
