from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ddpm_deploy import Engine, open_engine
from ddpm_deploy.engines import tune as tune_module
from ddpm_deploy.engines.build import Write, build_engine
from ddpm_deploy.engines.openvino import OpenVinoEngine
from ddpm_deploy.engines.tune import build_fastest, still_holds, this_machine, tune
from ddpm_deploy.errors import EngineBuildError
from ddpm_deploy.export.lower import lower_graph, write_engine
from ddpm_deploy.runtime import Runtime, RuntimeRecord
from ddpm_deploy.tuning import BatchTime
from ddpm_deploy.verify.likeness import Exact
from tests.support import tiny_spec, write_graph


class Judged:
    """Says what it is told to."""

    def __init__(self, psnr: Callable[[Engine], float], shift: float = 0.0) -> None:
        self.psnr = psnr
        self.shift = lambda _: np.full(1, shift)


RECORD = RuntimeRecord(
    runtime="openvino", graph_sha256="ab", machine=this_machine("a processor"), threads=2
)
ORT = replace(RECORD, runtime="onnxruntime")


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    return write_graph(tmp_path / "unet.onnx", tiny_spec())


def writer(graph: Path, runtime: Runtime) -> Write:
    return lambda record, path: write_engine(lower_graph(graph, runtime), record, path)


@pytest.mark.parametrize(
    ("alone", "parted", "streams", "batch"),
    [
        ((2, 1.0), (4, 1.0), 4, 4),  # by the image, four streams take half of the time
        ((2, 1.0), (4, 2.0), 1, 2),  # the same by the image: the simpler one
        ((1, 0.5), (4, 1.98), 1, 1),  # within what turns differ by
        ((8, 1.0), (4, 1.0), 1, 8),
    ],
)
def test_the_streams_with_most_images_a_second_are_kept(
    graph: Path, alone: tuple[int, float], parted: tuple[int, float], streams: int, batch: int
) -> None:
    measured = {1: alone, 4: parted}
    opened: list[int] = []

    def reopen(record: RuntimeRecord) -> OpenVinoEngine:
        opened.append(record.streams)
        return OpenVinoEngine(graph, record=record)

    def measure(engine: Engine) -> BatchTime:
        assert isinstance(engine, OpenVinoEngine)
        n, seconds = measured[engine.record.streams]
        return BatchTime(batch=n, seconds=seconds, memory=0)

    told: list[str] = []
    engine = OpenVinoEngine(graph, record=RECORD)
    found = tune(engine, RECORD, reopen=reopen, cores=4, measure=measure, on_progress=told.append)
    assert (found.streams, found.best_batch) == (streams, batch)
    assert opened == [4]
    assert told[0].startswith(f"openvino is fastest at batch {batch}")
    (one,) = [tune(engine, RECORD, reopen=reopen, cores=1, measure=measure)]
    assert (one.streams, one.best_batch) == (1, alone[0])
    assert opened == [4], "one core has one stream"


@pytest.mark.parametrize(
    "change",
    [
        {"graph_sha256": "cd"},
        {"precision": "bf16"},
        {"fused": True},
        {"threads": 1},
        {"budget": 1e-3},
        {"machine": {"processor": "another"}},
    ],
    ids=str,
)
def test_a_measurement_holds_for_what_was_asked_alone(change: dict[str, object]) -> None:
    measured = replace(
        RECORD, streams=2, best_batch=4, milliseconds={"onnxruntime": 2.0, "openvino": 1.0}
    )
    both: list[Runtime] = ["onnxruntime", "openvino"]
    assert still_holds(measured, ORT, both)
    assert not still_holds(replace(measured, **change), ORT, both)  # type: ignore[arg-type]
    assert not still_holds(measured, ORT, ["openvino"])
    assert not still_holds(replace(measured, milliseconds={}), ORT, both), "it was named"


def test_a_runtime_that_fails_leaves_the_others(
    graph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = build_engine

    def failing(graph: Path, output: Path, record: RuntimeRecord, **named: object) -> object:
        if record.runtime == "openvino":
            raise EngineBuildError("It is full.")
        return real(graph, output, record, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(tune_module, "build_engine", failing)
    told: list[str] = []
    output = graph.with_name("unet.cpu.onnx")
    built = build_fastest(
        graph, output, [ORT, RECORD], writer=lambda r: writer(graph, r), on_progress=told.append
    )
    assert built.record.runtime == "onnxruntime"
    assert "not for openvino: It is full." in told
    assert open_engine(output).best_batch == built.record.best_batch
    output.unlink()
    with pytest.raises(EngineBuildError, match="It is full"):
        build_fastest(graph, output, [RECORD], writer=lambda r: writer(graph, r))
    assert not output.exists()


def test_decibels_that_are_asked_for_are_kept_or_refused(graph: Path) -> None:
    output = graph.with_name("unet.bf16.ov.onnx")
    asked = [replace(RECORD, precision="bf16", arithmetic="bf16")]
    with pytest.raises(EngineBuildError, match=r"is 29\.5 dB from float32's; 30 are asked for"):
        build_fastest(
            graph,
            output,
            asked,
            writer=lambda r: writer(graph, r),
            judge=Judged(lambda _: 29.5),
            decibels=30.0,
        )
    assert not output.exists()
    built = build_fastest(
        graph,
        output,
        asked,
        writer=lambda r: writer(graph, r),
        judge=Judged(lambda _: 31.0),
        decibels=30.0,
    )
    assert built.record.psnr == 31.0


def test_int8_that_bfloat16_spoils_has_float32_between_its_layers(graph: Path) -> None:
    output = graph.with_name("unet.int8.ov.onnx")
    told: list[str] = []

    def judge(engine: Engine) -> float:
        assert isinstance(engine, OpenVinoEngine)
        return {"bf16": 28.0, "f32": 33.0}[engine.record.arithmetic]

    built = build_fastest(
        graph,
        output,
        [replace(RECORD, precision="int8", arithmetic="bf16")],
        writer=lambda r: writer(graph, r),
        judge=Judged(judge),
        decibels=30.0,
        on_progress=told.append,
    )
    assert (built.record.arithmetic, built.record.psnr) == ("f32", 33.0)
    assert any(
        "with bfloat16 between the int8 layers: float32 there, then" in line for line in told
    )


def test_what_the_mean_is_off_by_is_taken_off(graph: Path) -> None:
    output = graph.with_name("unet.bf16.ov.onnx")
    asked = [replace(RECORD, precision="bf16", arithmetic="bf16")]
    built = build_fastest(
        graph,
        output,
        asked,
        writer=lambda r: writer(graph, r),
        judge=Judged(lambda _: 40.0, shift=0.01),
    )
    assert built.record.shift == (0.01,)
    x = np.zeros((2, 1, 8, 8), np.float32)
    t = np.array([3, 4])
    with open_engine(output) as engine, open_engine(graph) as exact:
        np.testing.assert_allclose(engine(x, t), exact(x, t) - 0.01, atol=1e-4)


def test_an_engine_s_mean_and_its_likeness_are_measured_against_float32(tmp_path: Path) -> None:
    spec = tiny_spec(classes=3)
    graph = write_graph(tmp_path / "unet.onnx", spec)
    other = write_graph(tmp_path / "other.onnx", spec, bias=0.25)
    exact = Exact(opened=lambda: open_engine(graph))
    with open_engine(other) as engine, open_engine(graph) as same:
        np.testing.assert_allclose(exact.shift(engine), [0.25], atol=1e-6)
        assert exact.psnr(engine) < 40
        assert exact.psnr(same) == np.inf
