"""int8 holds its budget over the loop, and gives up what it must for it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from ddpm_deploy import ModelSpec, open_engine
from ddpm_deploy.errors import ExportError
from ddpm_deploy.export.precision import convert
from ddpm_deploy.export.qdq import int8_products
from ddpm_deploy.export.quantize import quantise
from ddpm_deploy.images import to_pixels
from ddpm_deploy.noise import SeededNoise
from ddpm_deploy.precision import METADATA_KEY as PRECISION_KEY
from ddpm_deploy.precision import read_precision
from ddpm_deploy.sampling import denoise
from ddpm_deploy.spec import METADATA_KEY
from ddpm_deploy.verify.measures import PictureErrors
from tests.support import conditioned_spec, tiny_spec, write_conditioned, write_fused, write_graph

SPEC = tiny_spec()
Array = np.ndarray[Any, Any]


def kernel(rng: np.random.Generator, outs: int, ins: int, size: int = 3) -> Array:
    """Weights that keep the size of what they read."""
    return np.asarray(rng.standard_normal((outs, ins, size, size)) / np.sqrt(ins * size**2))


def write(path: Path, *, loud: float = 1.0, spec: ModelSpec = SPEC) -> Path:
    """Writes out = 0.9 x + a little network of x, by hand.

    Args:
        path: Where to.
        loud: How much larger one channel before layer `c` is than the others; `c` undoes it. Its
            range then hides the others.
        spec: In the metadata.
    """
    model = parser.parse_model(
        """
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[batch, 1, 8, 8] x, int64[batch] t) => (float[batch, 1, 8, 8] out) {
            first = Conv <pads = [1, 1, 1, 1]> (x, w_first)
            a = Tanh(first)
            b = Conv <pads = [1, 1, 1, 1]> (a, w_b)
            b_tanh = Tanh(b)
            h = Mul(b_tanh, gain)
            c = Conv <pads = [1, 1, 1, 1]> (h, w_c)
            c_tanh = Tanh(c)
            d = Conv <pads = [1, 1, 1, 1]> (c_tanh, w_d)
            d_tanh = Tanh(d)
            all = Concat <axis = 1> (x, d_tanh)
            out = Conv(all, w_out)
        }
        """
    )
    rng = np.random.default_rng(0)
    gain = np.ones((1, 8, 1, 1))
    gain[0, 0] = loud
    weights = {
        "w_first": kernel(rng, 8, 1),
        "w_b": kernel(rng, 8, 8),
        "gain": gain,
        "w_c": kernel(rng, 8, 8) / gain,
        "w_d": kernel(rng, 8, 8),
        "w_out": np.concatenate([[[[[0.9]]]], 0.1 * kernel(rng, 1, 8, 1)], axis=1),
    }
    for name, value in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))
    onnx.helper.set_model_props(model, {METADATA_KEY: spec.to_json()})
    onnx.save_model(model, path)
    return path


def pictures(graph: Path, *, steps: int, seed: int, images: int) -> Array:
    """Draws with DDIM."""
    with open_engine(graph, device="cpu", threads=1) as engine:
        noise = SeededNoise(seed, range(images), engine.spec.sample_shape)
        for step in denoise(engine, engine.spec.table("ddim", steps), noise):
            x = step.x
    return to_pixels(x)


def test_a_network_that_int8_suits_keeps_nothing_back(tmp_path: Path) -> None:
    graph = write(tmp_path / "g.onnx")
    quantised = quantise(graph, psnr=30, steps=10, threads=1)
    assert int8_products(quantised.model) == ["b", "c", "d"]
    assert quantised.floats == {}
    assert quantised.groups == {
        "int8": "3 Conv",
        "float32, first and last product: x is read and the output written unrounded": "2 Conv",
    }


def test_what_it_says_of_its_loop_is_what_a_loop_gives(tmp_path: Path) -> None:
    graph, made = write(tmp_path / "g.onnx"), tmp_path / "int8.onnx"
    quantised = quantise(graph, psnr=30, steps=10, images=3, threads=1)
    onnx.save_model(quantised.model, made)
    given, wanted = (pictures(g, steps=10, seed=0, images=3) for g in (made, graph))
    assert quantised.psnr == pytest.approx(min(PictureErrors.between(given, wanted).psnr), abs=0.5)
    with open_engine(made, device="cpu") as engine:
        assert engine.precision == "int8"
        assert engine.spec == SPEC
    (text,) = (e.value for e in quantised.model.metadata_props if e.key == PRECISION_KEY)
    loop = read_precision(text, source="g").loop
    assert loop is not None
    assert (loop.sampler, loop.steps, loop.images, loop.seed, loop.budget) == ("ddim", 10, 3, 0, 30)
    assert loop.psnr == pytest.approx(quantised.psnr)
    assert loop.calibration == "12 timesteps of its own DDIM loop, 4 images, seed 1"


def test_the_layer_that_costs_the_budget_goes_back_and_no_other(tmp_path: Path) -> None:
    graph = write(tmp_path / "g.onnx", loud=3000)
    loose = quantise(graph, psnr=1, steps=10, threads=1)
    assert loose.floats == {}
    said: list[str] = []
    quantised = quantise(graph, psnr=45, steps=10, threads=1, on_progress=said.append)
    assert list(quantised.floats) == ["c"]
    assert int8_products(quantised.model) == ["b", "d"]
    assert loose.psnr is not None
    assert quantised.psnr is not None
    assert quantised.psnr >= 45 > loose.psnr
    assert quantised.groups["float32, accuracy: int8 costs too much of the budget here"] == "1 Conv"
    assert said[0] == "taking the ranges of int8 on x_t of 12 timesteps"
    assert re.fullmatch(
        r"3 of 3 layers in int8: [\d.]+ dB from float32 after 10 steps; 45 are asked for", said[1]
    )
    assert said[2] == "trying 3 layers, each alone in int8"


def test_a_budget_that_cannot_be_kept_is_refused_with_what_can(tmp_path: Path) -> None:
    graph = write(tmp_path / "g.onnx")
    match = r"worst image is [\d.]+ dB from float32's, with . of 3 layers .* the budget is 500 dB"
    with pytest.raises(ExportError, match=match) as caught:
        quantise(graph, psnr=500, steps=5, threads=1)
    assert re.match(r"Allow more: --int8 --budget psnr=\d\d; or build it with", caught.value.hint)


def test_pictures_serve_for_the_ranges(tmp_path: Path) -> None:
    graph = write(tmp_path / "g.onnx")
    data = np.random.default_rng(0).uniform(-1, 1, (5, 1, 8, 8)).astype(np.float32)
    quantised = quantise(graph, data=data, steps=5, threads=1)
    (text,) = (e.value for e in quantised.model.metadata_props if e.key == PRECISION_KEY)
    loop = read_precision(text, source="g").loop
    assert loop is not None
    assert loop.calibration == "5 pictures with noise, at 12 timesteps"


def test_a_graph_in_int8_is_given_back_as_it_is(tmp_path: Path) -> None:
    graph, made = write(tmp_path / "g.onnx"), tmp_path / "int8.onnx"
    once = quantise(graph, steps=5, threads=1)
    onnx.save_model(once.model, made)
    again = quantise(made, psnr=500)
    assert again.model == once.model
    assert (again.psnr, again.groups) == (once.psnr, once.groups)


def test_what_int8_cannot_be_made_of_is_refused(tmp_path: Path) -> None:
    half = tmp_path / "half.onnx"
    onnx.save_model(convert(onnx.load(write(tmp_path / "g.onnx")), "fp16").model, half)
    for graph, message in (
        (half, "is in fp16 already; int8 cannot be made of it"),
        (write_fused(tmp_path / "fused.onnx", SPEC), "is in float32 with its step fused"),
        (write_graph(tmp_path / "plain.onnx", SPEC), "has no layer that int8 suits"),
        (
            write_conditioned(tmp_path / "seen.onnx", conditioned_spec()),
            "has no layer that int8 suits",
        ),
    ):
        with pytest.raises(ExportError, match=message):
            quantise(graph)
