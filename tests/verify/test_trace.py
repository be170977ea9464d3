from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_deploy import Engine, ModelSpec, SeededNoise, denoise
from ddpm_deploy.arrays import Array
from ddpm_deploy.errors import DDPMDeployError, SpecError, TraceError
from ddpm_deploy.run import Recipe
from ddpm_deploy.sampling import Step
from ddpm_deploy.verify import Trace, engine_loop, read_trace, record, write_trace
from ddpm_deploy.verify.trace import chosen_steps, loop_steps
from tests.support import tiny_spec


class Shrinking(Engine):
    """A network of any samples: half of x, and t in its last channels where those are learned."""

    name = "shrinking"

    def __init__(self, spec: ModelSpec) -> None:
        self.spec, self.path = spec, Path("none")

    def _run(self, feeds: Mapping[str, Any]) -> np.ndarray:
        x, t = feeds["x"], feeds["t"]
        out = np.asarray(x / 2)
        if self.spec.output_shape == self.spec.sample_shape:
            return out
        v = np.broadcast_to((t / 20).astype(np.float32).reshape(-1, *[1] * (x.ndim - 1)), x.shape)
        return np.concatenate([out, v], axis=1)


def steps_of(spec: ModelSpec, recipe: Recipe, images: range = range(2)) -> list[Step]:
    """Returns the steps of the usual loop."""
    noise = SeededNoise(recipe.seed, images, spec.sample_shape)
    return list(denoise(recipe.predictor(Shrinking(spec), images), recipe.table(spec), noise))


def traced(spec: ModelSpec, recipe: Recipe | None = None, **settings: Any) -> Trace:
    recipe = recipe or Recipe()
    steps = steps_of(spec, recipe)
    return record(steps, spec=spec, recipe=recipe, images=range(2), **settings)


def same_bits(a: Array, b: Array) -> bool:
    return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def assert_same(given: Trace, wanted: Trace) -> None:
    assert (given.spec, given.recipe, given.images) == (wanted.spec, wanted.recipe, wanted.images)
    assert given.source == wanted.source
    assert same_bits(given.final, wanted.final)
    assert given.steps.keys() == wanted.steps.keys()
    for k, step in wanted.steps.items():
        assert (given.steps[k].k, given.steps[k].t) == (k, step.t)
        for name in ("x_t", "out", "x0", "x"):
            assert same_bits(getattr(given.steps[k], name), getattr(step, name)), (k, name)


RECIPES = [
    Recipe(),
    Recipe(sampler="ddpm", steps=7, spacing="trailing", seed=(1 << 64) - 1),
    Recipe(sampler="ddim", steps=5, eta=0.5),
    Recipe(sampler="ddim", steps=(19, 4, 0)),
    Recipe(sampler="ddim", steps=1),
    Recipe(sampler="dome272"),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: f"{r.sampler}-{r.steps}")
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 4, 6), (2, 5), (7,), (1, 2, 3, 4)])
def test_a_trace_comes_back_bit_for_bit(
    tmp_path: Path, recipe: Recipe, shape: tuple[int, ...]
) -> None:
    spec = replace(tiny_spec(), sample_shape=shape)
    trace = traced(spec, recipe, source={"name": "here", "sha256": "0" * 64})
    write_trace(tmp_path / "a.trace", trace)
    read = read_trace(tmp_path / "a.trace")
    assert_same(read, trace)
    assert list(read.steps) == list(range(1, len(recipe.table(spec)) + 1))


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_a_learned_variance_s_steps_come_back(tmp_path: Path, variance: Any) -> None:
    spec = replace(tiny_spec(), variance=variance)
    trace = traced(spec)
    assert trace.steps[1].out.shape == (2, 1, 8, 8)  # what it predicts, without v
    write_trace(tmp_path / "a.trace", trace)
    assert_same(read_trace(tmp_path / "a.trace"), trace)


def test_labels_guidance_and_pictures_come_back(tmp_path: Path, labelled: Engine) -> None:
    recipe = Recipe(labels=(2, 4), guidance=3.0)
    pixels = np.arange(2 * 64, dtype=np.uint8).reshape(2, 8, 8, 1)
    trace = record(
        loop_steps(engine_loop(labelled, recipe, [5, 9])),
        spec=labelled.spec,
        recipe=recipe,
        images=[5, 9],
        pictures=pixels,
    )
    write_trace(tmp_path / "a.trace", trace)
    read = read_trace(tmp_path / "a.trace")
    assert_same(read, trace)
    assert read.images == (5, 9)
    assert read.pictures is not None
    assert same_bits(read.pictures, pixels)


def test_numbers_that_are_not_finite_come_back(tmp_path: Path) -> None:
    steps = steps_of(tiny_spec(), Recipe())
    steps[3].out[0, 0, 0, 0] = np.nan
    trace = record(steps, spec=tiny_spec(), recipe=Recipe(), images=range(2))
    write_trace(tmp_path / "a.trace", trace)
    assert np.isnan(read_trace(tmp_path / "a.trace").steps[4].out[0, 0, 0, 0])


@pytest.mark.parametrize(
    ("count", "keep", "wanted"),
    [(5, 5, [1, 2, 3, 4, 5]), (5, 9, [1, 2, 3, 4, 5]), (5, 3, [1, 3, 5]), (5, 2, [1, 5])],
)
def test_steps_are_chosen_evenly_with_both_ends(count: int, keep: int, wanted: list[int]) -> None:
    assert chosen_steps(count, keep) == wanted


def test_some_of_the_steps_are_kept_with_the_states_they_need(tmp_path: Path) -> None:
    trace = traced(tiny_spec(timesteps=21), keep=3)
    assert list(trace.steps) == [1, 11, 21]
    write_trace(tmp_path / "a.trace", trace)
    assert_same(read_trace(tmp_path / "a.trace"), trace)
    with np.load(tmp_path / "a.trace") as file:  # what the page of the format says
        assert file["states_at"].tolist() == [0, 1, 10, 11, 20, 21]
        assert file["outputs_at"].tolist() == [1, 11, 21]
        assert file["states"].shape == (6, 2, 1, 8, 8)
        assert file["states"].dtype == file["outputs"].dtype == np.float32


def test_the_same_trace_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_trace(tmp_path / name, traced(tiny_spec()))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_loop_that_writes_to_its_arrays_again_is_recorded_as_it_was() -> None:
    def reusing() -> Any:
        buffers = [np.empty((2, 1, 8, 8), np.float32) for _ in range(4)]
        for step in steps_of(tiny_spec(), Recipe()):
            for buffer, name in zip(buffers, ("x_t", "out", "x0", "x"), strict=True):
                buffer[:] = getattr(step, name)
            x_t, out, x0, x = buffers
            yield Step(k=step.k, t=step.t, x_t=x_t, out=out, x0=x0, x=x)

    given = record(reusing(), spec=tiny_spec(), recipe=Recipe(), images=range(2))
    assert_same(given, traced(tiny_spec()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda steps: [], "The loop made no step; this recipe has 20"),
        (lambda steps: steps[:-1], "its last step as number 19; this recipe has 20"),
        (lambda steps: steps[1:], "its last step as number 20; this recipe has 20"),
        (
            lambda steps: [replace(step, x=step.x.astype(np.float64)) for step in steps],
            r"x of step 1 is float64 \(2, 1, 8, 8\); .* takes float32 \(2, 1, 8, 8\)",
        ),
        (
            lambda steps: [replace(step, out=step.out[:1]) for step in steps],
            r"out of step 1 is float32 \(1, 1, 8, 8\)",
        ),
    ],
)
def test_a_loop_that_is_not_the_recipe_s_is_not_recorded(
    change: Callable[[list[Step]], list[Step]], message: str
) -> None:
    steps = change(steps_of(tiny_spec(), Recipe()))
    with pytest.raises(TraceError, match=message):
        record(steps, spec=tiny_spec(), recipe=Recipe(), images=range(2))


@pytest.fixture
def written(tmp_path: Path) -> Path:
    small = replace(tiny_spec(timesteps=4), sample_shape=(1, 2, 2))
    write_trace(tmp_path / "good.trace", traced(small))
    return tmp_path / "good.trace"


def parts(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as file:
        return {name: file.read(name) for name in file.namelist()}


def rewrite(path: Path, files: Mapping[str, bytes], *, how: int = zipfile.ZIP_STORED) -> Path:
    """Writes a trace of other arrays with a hash that is right, as a stranger would."""
    order = ("header", "states_at", "states", "outputs_at", "outputs", "pictures")
    digest = hashlib.sha256(b"".join(files.get(f"{name}.npy", b"") for name in order))
    sums = npy(np.frombuffer(digest.digest(), np.uint8))
    with zipfile.ZipFile(path, "w", how) as file:
        for name, content in {**files, "sha256.npy": sums}.items():
            file.writestr(name, content)
    return path


def npy(array: Array) -> bytes:
    with io.BytesIO() as file:
        np.save(file, array)
        return file.getvalue()


def with_header(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Writes a trace again with another header."""
    files = parts(path)
    header = json.loads(np.load(io.BytesIO(files["header.npy"])).tobytes())
    change(header)
    said = np.frombuffer(json.dumps(header).encode(), np.uint8)
    return rewrite(path.with_name("changed.trace"), {**files, "header.npy": npy(said)})


def refused(path: Path) -> str:
    with pytest.raises(TraceError) as caught:
        read_trace(path)
    assert caught.value.hint
    return str(caught.value)


def test_a_trace_that_is_not_there_says_how_to_record_it(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="There is no trace") as caught:
        read_trace(tmp_path / "no.trace")
    assert "ddpm-deploy trace ckpt.pt -o" in caught.value.hint


@pytest.mark.parametrize(
    "content",
    [b"", b"PK", b"PK\x03\x04", b"not a zip at all" * 40, b"\x80\x04N.", b"\x93NUMPY\x01\x00"],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.trace").write_bytes(content)
    assert "is damaged, or no trace" in refused(tmp_path / "x.trace")


def test_other_zips_and_arrays_are_refused(tmp_path: Path, written: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros(3))
    assert "no trace" in refused(tmp_path / "x.npy")
    np.savez(tmp_path / "x.npz", states=np.zeros(3))
    assert "no trace" in refused(tmp_path / "x.npz")
    files = {name: content for name, content in parts(written).items() if name != "sha256.npy"}
    assert "holds more.npy" in refused(rewrite(tmp_path / "a", {**files, "more.npy": b""}))
    del files["outputs.npy"]
    assert "and not outputs.npy" in refused(rewrite(tmp_path / "b", files))


def test_every_truncated_file_is_refused(tmp_path: Path, written: Path) -> None:
    content = written.read_bytes()
    place = tmp_path / "cut.trace"
    for length in range(0, len(content), 7):
        place.write_bytes(content[:length])
        refused(place)


def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path: Path, written: Path) -> None:
    # A zip has fields that nobody reads, such as dates.
    content, wanted = written.read_bytes(), read_trace(written)
    place = tmp_path / "flipped.trace"
    refusals = 0
    for at in range(len(content)):
        place.write_bytes(content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :])
        try:
            assert_same(read_trace(place), wanted)
        except TraceError:
            refusals += 1
    assert refusals > 0.85 * len(content)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_array_in_place_of_another_is_an_error_of_ours(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp()
    small = replace(tiny_spec(timesteps=4), sample_shape=(1, 2, 2))
    write_trace(folder / "good.trace", traced(small))
    files = parts(folder / "good.trace")
    name = data.draw(st.sampled_from(sorted(files)))
    content = files[name]
    at = data.draw(st.integers(0, len(content) - 1))
    junk = data.draw(st.binary(min_size=1, max_size=12))
    files[name] = content[:at] + junk + content[at + len(junk) :]
    with suppress(DDPMDeployError):
        read_trace(rewrite(folder / "junk.trace", files))


HUGE = b"\x93NUMPY\x01\x00v\x00" + (
    b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000000,), }".ljust(117) + b"\n"
)


def test_what_would_fill_the_memory_is_refused(tmp_path: Path, written: Path) -> None:
    files = parts(written)
    assert "no trace" in refused(rewrite(tmp_path / "a", {**files, "states.npy": HUGE}))
    zeros = {**files, "states.npy": npy(np.zeros(1 << 22, np.float32))}
    bomb = rewrite(tmp_path / "b", zeros, how=zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 1 << 16
    assert "is compressed" in refused(bomb)


def test_objects_are_not_unpickled(tmp_path: Path, written: Path) -> None:
    files = {**parts(written), "states.npy": npy(np.array([print], dtype=object))}
    assert "Object arrays cannot be loaded" in refused(rewrite(tmp_path / "a", files))


def set_at(*keys: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        for key in keys[:-1]:
            header = header[key]
        header[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_at("format", value=2), "has format 2; this release reads up to 1"),
        (set_at("noise", value="mt19937"), "recorded with the noise mt19937; this release draws"),
        (set_at("recipe", "sampler", value="euler"), "sampler is 'euler'"),
        (set_at("recipe", "seed", value="7"), "its recipe is"),
        (set_at("recipe", "seed", value=-1), "the seed is -1"),
        (set_at("recipe", "guidance", value=float("nan")), "its recipe is"),
        (set_at("recipe", "eta", value="much"), "no trace"),
        (set_at("recipe", "more", value=1), "no trace"),
        (set_at("recipe", "labels", value=["cat"]), "its recipe is"),
        (set_at("recipe", "steps", value=3), "states are numbered"),
        (set_at("recipe", value=None), "no trace"),
        (set_at("images", value=[]), "its images are"),
        (set_at("images", value=[0.5, 1]), "its images are"),
        (set_at("images", value=[0, 1 << 64]), "the image index is"),
        (set_at("images", value=[0, 1, 2]), r"states are float32 \(5, 2, 1, 2, 2\)"),
        (set_at("source", value=3), "no trace"),
        (set_at("format", value="1"), "no trace"),
    ],
)
def test_a_header_that_makes_no_sense_is_refused(
    written: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    with pytest.raises(TraceError, match=message):
        read_trace(with_header(written, change))


def test_a_damaged_spec_is_the_spec_s_error(written: Path) -> None:
    with pytest.raises(SpecError, match=r"changed\.trace"):
        read_trace(with_header(written, set_at("spec", "sample_shape", value=[0])))


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("outputs_at", np.array([0, 1, 2, 3]), r"outputs are numbered \[0, 1, 2, 3\]"),
        ("outputs_at", np.array([1, 1, 2, 3]), "outputs are numbered"),
        ("outputs_at", np.array([1.0, 2.0, 3.0, 4.0]), "outputs are numbered"),
        ("states_at", np.array([0, 1, 2, 3, 5]), "states are numbered"),
        ("states_at", np.array([4, 3, 2, 1, 0]), "states are numbered"),
        ("states", np.zeros((5, 2, 1, 2, 2)), r"states are float64 \(5, 2, 1, 2, 2\)"),
        ("outputs", np.zeros((4, 2, 4), np.float32), r"outputs are float32 \(4, 2, 4\)"),
        ("pictures", np.zeros((2, 2, 2, 3), np.uint8), r"pictures are uint8 \(2, 2, 2, 3\)"),
        ("pictures", np.zeros((2, 2, 2, 1)), r"pictures are float64"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(
    tmp_path: Path, written: Path, name: str, array: Array, message: str
) -> None:
    files = {**parts(written), f"{name}.npy": npy(array)}
    with pytest.raises(TraceError, match=message):
        read_trace(rewrite(tmp_path / "a", files))


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ([], "output 4, the last, is missing"),
        ([1], "output 4, the last, is missing"),
        ([1, 2, 4], r"states \[2\] are missing"),
    ],
)
def test_a_loop_that_is_not_all_there_is_refused(
    tmp_path: Path, written: Path, at: list[int], message: str
) -> None:
    # Whoever compares nothing would find no difference.
    small = replace(tiny_spec(timesteps=4), sample_shape=(1, 2, 2))
    write_trace(written, traced(small, keep=2))  # transitions 1 and 4 of 4
    outputs = np.zeros((len(at), 2, 1, 2, 2), np.float32)
    files = {"outputs_at.npy": npy(np.array(at, np.int64)), "outputs.npy": npy(outputs)}
    with pytest.raises(TraceError, match=message):
        read_trace(rewrite(tmp_path / "a", {**parts(written), **files}))


@pytest.mark.parametrize("keep", [1, 0, -1])
def test_a_trace_keeps_both_ends(keep: int) -> None:
    with pytest.raises(ValueError, match=f"^{keep} steps are to be kept; the first and the last"):
        traced(tiny_spec(), keep=keep)


def test_a_place_that_cannot_be_written_keeps_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OSError, match="file"):
        write_trace(tmp_path / "file" / "a.trace", traced(tiny_spec()))
    assert (tmp_path / "file").read_text() == "kept"
