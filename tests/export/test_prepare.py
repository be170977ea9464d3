from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, numpy_helper

from ddpm_deploy.engines.build_settings import BuildSettings, Precision
from ddpm_deploy.engines.plan import Profile
from ddpm_deploy.errors import EngineError, ExportError, SpecError
from ddpm_deploy.export.precision import recorded
from ddpm_deploy.export.prepare import prepare_graph, read_graph
from tests.support import tiny_spec, write_graph


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    return write_graph(tmp_path / "unet.onnx", tiny_spec(classes=4))


def settings(precision: Precision, *, fuse_step: bool = False) -> BuildSettings:
    return BuildSettings(
        flavour="tensorrt",
        precision=precision,
        profiles=(Profile(least=1, best=1, most=1),),
        fuse_step=fuse_step,
    )


def test_a_graph_s_spec_is_read_from_its_metadata(graph: Path) -> None:
    assert read_graph(graph) == (tiny_spec(classes=4), False)


def test_what_is_no_graph_of_ours_is_refused(tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.onnx"
    garbage.write_bytes(b"garbage")
    with pytest.raises(EngineError, match=r"onnx cannot load .*garbage\.onnx"):
        read_graph(garbage)
    with pytest.raises(EngineError, match=r"There is no file .*missing\.onnx"):
        read_graph(tmp_path / "missing.onnx")
    with pytest.raises(SpecError, match="carries no ddpm-deploy spec"):
        read_graph(write_graph(tmp_path / "bare.onnx", None))


def test_float32_is_the_graph_itself(graph: Path, tmp_path: Path) -> None:
    prepared = prepare_graph(graph, settings("fp32"), tmp_path / "prepared.onnx")
    assert prepared.path == graph
    assert not (tmp_path / "prepared.onnx").exists()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_lower_precision_is_another_graph_with_the_same_spec(
    graph: Path, tmp_path: Path, precision: Precision
) -> None:
    before = graph.read_bytes()
    prepared = prepare_graph(graph, settings(precision), tmp_path / "new" / "prepared.onnx")
    assert prepared.path == tmp_path / "new" / "prepared.onnx"
    assert prepared.groups
    assert read_graph(prepared.path) == read_graph(graph)
    assert graph.read_bytes() == before
    mixed = recorded(onnx.load_model(prepared.path))
    assert mixed is not None
    assert mixed.precision == precision


def test_a_graph_in_half_precision_is_taken_as_it_is_and_not_for_float32(
    graph: Path, tmp_path: Path
) -> None:
    mixed = prepare_graph(graph, settings("fp16"), tmp_path / "mixed.onnx").path
    again = prepare_graph(mixed, settings("fp16"), tmp_path / "again.onnx")
    assert again.path == mixed
    assert again.groups
    with pytest.raises(ExportError, match=r"mixed\.onnx is in fp16 already"):
        prepare_graph(mixed, settings("fp32"), tmp_path / "again.onnx")


def test_types_that_another_tool_chose_are_kept_by_fp32(graph: Path, tmp_path: Path) -> None:
    model = onnx.load_model(graph)
    gain = next(tensor for tensor in model.graph.initializer if tensor.name == "gain")
    half = numpy_helper.to_array(gain).astype("float16")
    gain.CopyFrom(numpy_helper.from_array(half, "gain"))
    assert gain.data_type == TensorProto.FLOAT16
    onnx.save_model(model, graph)
    assert prepare_graph(graph, settings("fp32"), tmp_path / "new.onnx").path == graph
    with pytest.raises(ExportError, match="half-precision"):
        prepare_graph(graph, settings("fp16"), tmp_path / "new.onnx")


def test_the_step_is_fused_behind_the_precision_and_not_before_it(
    graph: Path, tmp_path: Path
) -> None:
    fused = prepare_graph(graph, settings("fp16", fuse_step=True), tmp_path / "half.onnx").path
    assert read_graph(fused) == (tiny_spec(classes=4), True)
    inputs = {entry.name: entry.type.tensor_type for entry in onnx.load_model(fused).graph.input}
    assert {inputs[name].elem_type for name in ("x", "row", "z")} == {TensorProto.FLOAT}
    whole = prepare_graph(graph, settings("fp32", fuse_step=True), tmp_path / "whole.onnx").path
    with pytest.raises(ExportError, match=r"whole\.onnx is in float32 with its step fused"):
        prepare_graph(whole, settings("fp16", fuse_step=True), tmp_path / "late.onnx")
