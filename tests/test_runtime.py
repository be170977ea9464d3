from __future__ import annotations

import json

import pytest

from ddpm_deploy.errors import SpecError
from ddpm_deploy.runtime import RuntimeRecord, read_runtime

RECORD = RuntimeRecord(
    runtime="openvino",
    precision="bf16",
    arithmetic="bf16",
    streams=2,
    best_batch=4,
    graph_sha256="ab" * 32,
    error=3e-3,
    shift=(1e-3, -2e-3, 0.0),
    psnr=41.5,
    milliseconds={"onnxruntime": 40.0, "openvino": 36.5},
    machine={"processor": "a processor", "openvino": "openvino 2026.4.1"},
)


def test_a_record_is_read_as_it_was_written() -> None:
    assert read_runtime(RECORD.to_json(), source="x") == RECORD


def test_a_graph_has_no_record() -> None:
    assert read_runtime(None, source="x") is None


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"runtime": "tflite"},
        {"precision": "fp4"},
        {"arithmetic": "f16"},
        {"streams": 0},
        {"streams": True},
        {"best_batch": -1},
        {"best_batch": 0},
        {"milliseconds": {"onnxruntime": "x"}},
        {"error": "abc"},
        {"shift": ["a"]},
        {"shift": 3},
        {"machine": [1]},
        {"machine": {"cores": 2}},
        {"colour": "red"},
    ],
    ids=str,
)
def test_what_is_damaged_is_refused(change: dict[str, object]) -> None:
    text = json.dumps({**json.loads(RECORD.to_json()), **change})
    with pytest.raises(SpecError, match=r"unet\.onnx says that it was built for one runtime"):
        read_runtime(text, source="unet.onnx")


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", "[" * 100_000])
def test_what_is_no_record_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match="but not how"):
        read_runtime(text, source="unet.onnx")
