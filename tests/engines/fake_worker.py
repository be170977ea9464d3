"""Speaks as the build's process does, without TensorRT: what it says is in FAKE_WORKER.

A JSON object: `device`; `then`, which is "build", the message that it fails with, or the number of
a signal that it dies of; and `fits`, the profiles that it builds all the same.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

told = json.loads(os.environ["FAKE_WORKER"])
print(
    json.dumps(
        {
            "kind": "ready",
            "version": "10.3.0",
            "device": told["device"],
            "capabilities": [],
        }
    ),
    flush=True,
)
line = sys.stdin.readline()
if not line:
    sys.exit()
request = json.loads(line)
then = "build" if request["profiles"] == told.get("fits") else told["then"]
if isinstance(then, int):
    print("[W] a warning\n[E] the last words", file=sys.stderr, flush=True)
    os.kill(os.getpid(), then)
if then != "build":
    print(f"[W] a warning\n[E] {then}", file=sys.stderr, flush=True)
    failed = {"kind": "failed", "message": "Invalid Engine", "hint": "", "missing": False}
    print(json.dumps(failed))
    sys.exit()
if request["timing_cache"]:
    old = Path(request["timing_cache"])
    Path(request["new_timing_cache"]).write_bytes(
        (old.read_bytes() if old.is_file() else b"") + b"measured;"
    )
inputs = {"x": ["FLOAT", [-1, 1, 8, 8]], "t": ["INT64", [-1]]}
print(json.dumps({"kind": "parsed", "layers": {"CONVOLUTION HALF": 2}, "inputs": inputs}))
Path(request["plan"]).write_text(json.dumps(request))
print(json.dumps({"kind": "built", "seconds": 0.5}))
