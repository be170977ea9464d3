from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper, parser

from ddpm_deploy.engines.build_settings import BuildSettings
from ddpm_deploy.engines.flavour import Flavour
from ddpm_deploy.engines.plan import Profile
from ddpm_deploy.errors import EngineError, ExportError, SpecError
from ddpm_deploy.export.attention import find_attention
from ddpm_deploy.export.onnx_file import weight_files
from ddpm_deploy.export.precision import convert, recorded
from ddpm_deploy.export.prepare import (
    ATTENTION_BYTES,
    Lowered,
    lower_precision,
    prepare_graph,
    read_header,
)
from ddpm_deploy.precision import Precision
from ddpm_deploy.spec import METADATA_KEY
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
    assert read_header(graph) == (tiny_spec(classes=4), False, "fp32")


def test_what_is_no_graph_of_ours_is_refused(tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.onnx"
    garbage.write_bytes(b"garbage")
    with pytest.raises(EngineError, match=r"garbage\.onnx is no ONNX file"):
        read_header(garbage)
    with pytest.raises(EngineError, match=r"There is no file .*missing\.onnx"):
        read_header(tmp_path / "missing.onnx")
    with pytest.raises(SpecError, match="carries no ddpm-deploy spec"):
        read_header(write_graph(tmp_path / "bare.onnx", None))


@pytest.mark.parametrize("offset", ["99999999", "none"])
def test_weights_that_are_not_where_the_graph_says_are_refused(graph: Path, offset: str) -> None:
    onnx.save_model(
        onnx.load(graph), graph, save_as_external_data=True, location="w", size_threshold=0
    )
    model = onnx.load(graph, load_external_data=False)
    for tensor in model.graph.initializer:
        next(e for e in tensor.external_data if e.key == "offset").value = offset
    graph.write_bytes(model.SerializeToString())
    with pytest.raises(EngineError, match=r"unet\.onnx is no ONNX file"):
        lower_precision(graph, "fp32")


def test_weights_in_other_files_are_found(graph: Path) -> None:
    assert weight_files(graph) == []
    onnx.save_model(
        onnx.load(graph), graph, save_as_external_data=True, location="w", size_threshold=0
    )
    assert weight_files(graph) == [graph.parent / "w"]
    (graph.parent / "w").unlink()
    with pytest.raises(EngineError, match=r"unet\.onnx has weights in .*w, which is no file"):
        weight_files(graph)


def test_a_graph_without_the_output_of_a_network_is_refused(graph: Path) -> None:
    model = onnx.load(graph)
    model.graph.output[0].name = "labelled"
    onnx.save_model(model, graph)
    with pytest.raises(SpecError, match=r"unet\.onnx gives labelled; the output of a network"):
        read_header(graph)


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
    assert read_header(prepared.path) == (*read_header(graph)[:2], precision)
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
    assert read_header(fused)[:2] == (tiny_spec(classes=4), True)
    inputs = {entry.name: entry.type.tensor_type for entry in onnx.load_model(fused).graph.input}
    assert {inputs[name].elem_type for name in ("x", "row", "z")} == {TensorProto.FLOAT}
    whole = prepare_graph(graph, settings("fp32", fuse_step=True), tmp_path / "whole.onnx").path
    with pytest.raises(ExportError, match=r"whole\.onnx is in float32 with its step fused"):
        prepare_graph(whole, settings("fp16", fuse_step=True), tmp_path / "late.onnx")


def write_attention(path: Path) -> Path:
    """Writes an attention of 4 heads over 4096 numbers of 16: a matrix of 268 MB in float32."""
    model = parser.parse_model(
        """
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[batch, 4, 4096, 16] x, int64[batch] t) => (float[batch, 4, 4096, 16] out)
        {
            first = MatMul (x, w)
            keys = Transpose <perm = [0, 1, 3, 2]> (first)
            scores = MatMul (first, keys)
            shares = Softmax <axis = -1> (scores)
            mean = MatMul (shares, first)
            out = MatMul (mean, w)
        }
        """
    )
    model.graph.initializer.append(numpy_helper.from_array(np.eye(16, dtype=np.float32), "w"))
    spec = tiny_spec().with_changes(sample_shape=(4, 4096, 16))
    onnx.helper.set_model_props(model, {METADATA_KEY: spec.to_json()})
    onnx.save_model(model, path)
    return path


@pytest.mark.parametrize(
    ("flavour", "precision", "parts"),
    [
        ("tensorrt", "fp16", 4),  # 134 MB an image; whether it is fused is not certain
        ("tensorrt", "fp32", 4),
        ("tensorrt_rtx", "fp32", 4),  # it does not fuse float32
        ("tensorrt_rtx", "fp16", 1),  # it fuses half precision
    ],
)
def test_attention_is_cut_where_the_runtime_may_hold_its_matrix(
    tmp_path: Path, flavour: Flavour, precision: Precision, parts: int
) -> None:
    graph = write_attention(tmp_path / "unet.onnx")
    batch = Profile(least=1, best=1, most=2)
    chosen = BuildSettings(flavour=flavour, precision=precision, profiles=(batch,))
    lowered = None
    if precision == "fp16":  # by rule: to measure it takes seconds
        mixed = convert(onnx.load_model(graph), "fp16")
        lowered = Lowered(model=mixed.model, changed=True, groups=mixed.groups)
    prepared = prepare_graph(graph, chosen, tmp_path / "prepared.onnx", lowered=lowered)
    model = onnx.load_model(prepared.path)
    softmaxes = [node for node in model.graph.node if node.op_type == "Softmax"]
    assert len(softmaxes) >= parts if parts > 1 else len(softmaxes) == 1
    assert 0 < prepared.memory < 4 * ATTENTION_BYTES  # a whole matrix of float32 alone is as much
    if parts > 1:
        for attention in find_attention(model, batch=2):
            assert attention.whole_bytes <= ATTENTION_BYTES


def test_half_precision_is_measured_and_the_error_travels_with_the_graph(
    graph: Path, tmp_path: Path
) -> None:
    lowered = lower_precision(graph, "bf16", budget=0.1)
    assert lowered.error is not None
    assert 0 <= lowered.error < 0.1
    prepared = prepare_graph(graph, settings("bf16"), tmp_path / "g.onnx", lowered=lowered)
    assert prepared.error == lowered.error
    assert lower_precision(prepared.path, "bf16").error == lowered.error  # taken as it is


def test_without_onnx_runtime_half_precision_is_chosen_by_rule_and_that_is_said(
    graph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "ddpm_deploy.engines.ort", raising=False)
    said: list[str] = []
    lowered = lower_precision(graph, "fp16", on_progress=said.append)
    assert (lowered.error, lowered.changed) == (None, True)
    assert said[-1].startswith("note: fp16 was chosen by rule and not measured, for want of ONNX")
