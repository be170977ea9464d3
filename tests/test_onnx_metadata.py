from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from ddpm_deploy.errors import EngineError
from ddpm_deploy.onnx_metadata import read_metadata
from tests.support import tiny_spec, write_graph


def model(pairs: dict[str, str], numbers: int = 3) -> onnx.ModelProto:
    weights = numpy_helper.from_array(np.arange(numbers, dtype=np.float32), "w")
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [numbers])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, [numbers])
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["out"])], "g", [x], [out], [weights]
    )
    made = helper.make_model(graph, producer_name="a test", doc_string="of 300 letters" * 20)
    helper.set_model_props(made, pairs)
    return made


@settings(max_examples=50, deadline=None)
@given(
    pairs=st.dictionaries(st.text(max_size=20), st.text(max_size=300), max_size=5),
    numbers=st.integers(1, 300),
)
def test_metadata_are_what_onnx_reads(
    tmp_path_factory: pytest.TempPathFactory, pairs: dict[str, str], numbers: int
) -> None:
    path = tmp_path_factory.mktemp("m") / "unet.onnx"
    onnx.save_model(model(pairs, numbers), path)
    wanted = {p.key: p.value for p in onnx.load_model(path).metadata_props}
    assert read_metadata(path) == wanted


@pytest.mark.parametrize("end", [1, 7, 40, 200])
def test_a_file_that_is_cut_off_is_refused(tmp_path: Path, end: int) -> None:
    path = write_graph(tmp_path / "unet.onnx", tiny_spec())
    path.write_bytes(path.read_bytes()[:-end])
    with pytest.raises(EngineError, match="cannot be read as an ONNX file"):
        read_metadata(path)


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=200))
def test_any_bytes_are_metadata_or_one_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.mktemp("m") / "unet.onnx"
    path.write_bytes(content)
    with suppress(EngineError):
        assert isinstance(read_metadata(path), dict)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.onnx", tmp_path):
        with pytest.raises(EngineError, match="cannot be read as an ONNX file"):
            read_metadata(path)
