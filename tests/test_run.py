from __future__ import annotations

import json
import math
import threading
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from ddpm_deploy import Engine, ModelSpec, Schedule, SeededNoise, denoise, linear, open_engine
from ddpm_deploy.errors import EngineError, EngineInputError, RunError
from ddpm_deploy.images import to_pixels
from ddpm_deploy.run import GIF_NAME, Recipe, Run, batch_for, default_batch, recorded_batch, sample
from ddpm_deploy.spec import METADATA_KEY
from tests.commands import contents
from tests.support import tiny_spec, write_fused, write_graph


def draw(
    folder: Path,
    engine: Engine,
    recipe: Recipe | None = None,
    *,
    count: int = 8,
    start: int = 0,
    batch: int = 3,
    overwrite: bool = False,
    gif: Path | None = None,
) -> list[Path]:
    """Runs a run to its end; returns the images that it drew."""
    run = Run(
        folder=folder,
        engine=engine,
        recipe=recipe or Recipe(),
        count=count,
        start=start,
        batch=batch,
    )
    run.prepare(overwrite=overwrite)
    drawn = list(run.draw(gif=gif, on_step=lambda _: None))
    run.finish({})
    return drawn


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("0*.*"))}


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_an_image_is_the_same_bytes_in_any_batch_and_count(
    tmp_path: Path, engine: Engine, batch: int
) -> None:
    recipe = Recipe(seed=7)
    draw(tmp_path / "reference", engine, recipe, count=12, batch=12)
    reference = pictures(tmp_path / "reference")
    for count in (1, 5, 12):
        draw(tmp_path / f"n{count}", engine, recipe, count=count, batch=batch)
        drawn = pictures(tmp_path / f"n{count}")
        assert list(drawn) == [f"{i:06d}.png" for i in range(count)]
        assert drawn.items() <= reference.items()


def test_shards_together_are_the_whole_run(tmp_path: Path, engine: Engine) -> None:
    draw(tmp_path / "whole", engine, count=10)
    for start, count in [(7, 3), (0, 4), (4, 3)]:
        draw(tmp_path / "shards", engine, start=start, count=count, batch=2)
    assert pictures(tmp_path / "shards") == pictures(tmp_path / "whole")


def test_an_extended_run_draws_only_what_is_new(tmp_path: Path, engine: Engine) -> None:
    draw(tmp_path / "whole", engine, count=12)
    draw(tmp_path / "run", engine, count=8)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("0*.png")}
    drawn = draw(tmp_path / "run", engine, count=12)
    assert [path.name for path in drawn] == [f"{i:06d}.png" for i in range(8, 12)]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert pictures(tmp_path / "run") == pictures(tmp_path / "whole")


def test_a_stopped_run_continues_with_the_same_bytes(tmp_path: Path, engine: Engine) -> None:
    draw(tmp_path / "whole", engine, count=8)
    run = Run(folder=tmp_path / "run", engine=engine, recipe=Recipe(), count=8, batch=3)
    run.prepare()
    with closing(run.draw(on_step=lambda _: None)) as drawing:
        stopped = list(islice(drawing, 4))
    assert run.missing() == 2  # the batch of the fourth is written to its end
    drawn = draw(tmp_path / "run", engine, count=8)
    assert len(drawn) == 2
    assert not set(stopped) & set(drawn)
    assert pictures(tmp_path / "run") == pictures(tmp_path / "whole")


def test_a_batch_that_is_half_there_is_computed_whole(tmp_path: Path, engine: Engine) -> None:
    # An engine's rounding may depend on the batch, so the block is the same when a run continues.
    draw(tmp_path / "run", engine, count=6, batch=3)
    (tmp_path / "run" / "000001.png").unlink()
    run = Run(folder=tmp_path / "run", engine=engine, recipe=Recipe(), count=6, batch=3)
    assert list(run.blocks()) == [(range(3), [1])]


def test_leftovers_of_a_killed_process_do_not_count_and_go_away(
    tmp_path: Path, engine: Engine
) -> None:
    folder = tmp_path / "run"
    draw(folder, engine, count=3)
    whole = contents(folder)
    (folder / "000001.png").unlink()
    (folder / ".000001.0a1b2c3d.part.png").write_bytes(b"\x89PNG half")
    draw(folder, engine, count=3)
    assert contents(folder).keys() == whole.keys()
    assert pictures(folder)["000001.png"] == whole["000001.png"]


def test_a_file_that_another_process_is_writing_stays(tmp_path: Path, engine: Engine) -> None:
    run = Run(folder=tmp_path / "run", engine=engine, recipe=Recipe(), count=3)
    run.prepare()
    theirs = run.folder / ".000001.0a1b2c3d.part.png"
    theirs.write_bytes(b"\x89PNG half")
    list(run.draw(on_step=lambda _: None))
    assert theirs.exists()
    shard = Run(folder=run.folder, engine=engine, recipe=Recipe(), start=3, count=3)
    shard.prepare()
    assert theirs.exists()


@pytest.mark.parametrize("content", ["nothing", "another size"])
def test_an_image_that_was_damaged_is_named(tmp_path: Path, engine: Engine, content: str) -> None:
    draw(tmp_path, engine)
    whole = pictures(tmp_path)
    path = tmp_path / "000003.png"
    path.write_bytes(b"")
    if content == "another size":
        Image.new("L", (5, 5)).save(path)
    with pytest.raises(RunError, match=r"000003\.png is not the image that was written") as caught:
        draw(tmp_path, engine)
    assert caught.value.hint == "Remove it, and the same command draws it anew."
    path.unlink()
    draw(tmp_path, engine)
    assert pictures(tmp_path) == whole


def test_pixels_are_those_of_the_loop(tmp_path: Path, engine: Engine) -> None:
    draw(tmp_path, engine, Recipe(seed=3, sampler="ddim", steps=5), count=2)
    table = engine.spec.table("ddim", 5)
    *_, last = denoise(engine, table, SeededNoise(3, [0, 1], (1, 8, 8)))
    for i, expected in enumerate(to_pixels(last.x)):
        np.testing.assert_array_equal(
            np.asarray(Image.open(tmp_path / f"00000{i}.png")), expected[..., 0]
        )


def test_run_json_reproduces_the_run(tmp_path: Path, labelled: Engine) -> None:
    recipe = Recipe(
        seed=5, sampler="ddim", steps=6, eta=0.5, spacing="trailing", labels=(2, 0), guidance=2.0
    )
    draw(tmp_path / "one", labelled, recipe, count=5)
    report = json.loads((tmp_path / "one" / "run.json").read_text())
    said = report["identity"]
    again = Recipe(
        seed=said["seed"],
        sampler=said["sampler"],
        steps=said["steps"],
        eta=said["eta"],
        spacing=said["spacing"],
        labels=tuple(said["labels"]),
        guidance=said["guidance"],
    )
    assert again == recipe
    draw(tmp_path / "two", labelled, again, count=report["count"], start=report["start"])
    assert pictures(tmp_path / "one") == pictures(tmp_path / "two")
    assert report["finished"] is True
    assert ModelSpec.from_dict(report["spec"]) == labelled.spec


def test_defaults_in_run_json_are_spelled_out(tmp_path: Path, labelled: Engine) -> None:
    draw(tmp_path / "run", labelled, count=2)
    said = json.loads((tmp_path / "run" / "run.json").read_text())["identity"]
    assert (said["sampler"], said["steps"], said["labels"]) == ("ddpm", 20, [0, 1, 2, 3])
    assert (said["device"], said["noise"]) == ("onnxruntime CPU", "philox4x64-box-muller-1")


@pytest.mark.parametrize(
    ("recipe", "differing"),
    [
        (Recipe(seed=1), "seed was 0, is 1"),
        (Recipe(sampler="ddim"), "sampler was ddpm, is ddim"),
        (Recipe(sampler="ddim", steps=5, eta=0.5), "steps was 20, is 5; eta was 0.0, is 0.5"),
        (Recipe(steps=5, spacing="linspace"), "spacing was leading, is linspace"),
    ],
)
def test_another_run_in_the_folder_is_refused_and_named(
    tmp_path: Path, engine: Engine, recipe: Recipe, differing: str
) -> None:
    folder = tmp_path / "run"
    draw(folder, engine)
    before = contents(folder)
    with pytest.raises(RunError) as caught:
        draw(folder, engine, recipe)
    assert str(caught.value).startswith(f"{folder} holds another run: ")
    assert differing in str(caught.value)
    assert "--overwrite" in caught.value.hint
    assert contents(folder) == before


def test_another_engine_in_the_folder_is_refused(tmp_path: Path, engine: Engine) -> None:
    draw(tmp_path / "run", engine)
    other = open_engine(write_graph(tmp_path / "other.onnx", tiny_spec(), bias=0.1))
    with pytest.raises(RunError, match="engine sha256 was"):
        draw(tmp_path / "run", other)


def test_overwrite_draws_anew_and_removes_what_the_old_run_wrote(
    tmp_path: Path, engine: Engine
) -> None:
    folder = tmp_path / "run"
    draw(folder, engine, count=5, gif=folder / GIF_NAME)
    (folder / "notes.txt").write_text("mine")
    draw(folder, engine, Recipe(seed=1), count=2, overwrite=True)
    draw(tmp_path / "fresh", engine, Recipe(seed=1), count=2)
    assert pictures(folder) == pictures(tmp_path / "fresh")
    assert sorted(contents(folder)) == [
        "000000.png",
        "000001.png",
        "grid.png",
        "notes.txt",
        "run.json",
    ]


def test_images_that_no_run_made_are_refused(tmp_path: Path, engine: Engine) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "000003.png").write_bytes(b"mine")
    with pytest.raises(RunError, match=r"holds 000003.png but no run.json"):
        draw(folder, engine)
    assert contents(folder) == {"000003.png": b"mine"}
    (folder / "000003.png").rename(folder / "holiday.png")
    draw(folder, engine, count=1)
    assert (folder / "holiday.png").read_bytes() == b"mine"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"seed": 1}', '{"identity": 3}'])
def test_a_damaged_run_json_is_refused(tmp_path: Path, engine: Engine, text: str) -> None:
    draw(tmp_path / "run", engine, count=1)
    (tmp_path / "run" / "run.json").write_text(text)
    with pytest.raises(RunError, match=r"run\.json is damaged"):
        draw(tmp_path / "run", engine, count=1)


def test_labels_are_taken_in_turn_by_the_index_of_the_image(labelled: Engine) -> None:
    whole = sample(labelled, Recipe(labels=(3, 1)), range(4))
    for image, label in enumerate((3, 1, 3, 1)):
        alone = sample(labelled, Recipe(labels=(label,)), [image])
        np.testing.assert_array_equal(alone[0], whole[image])
    every = sample(labelled, Recipe(), range(4))
    np.testing.assert_array_equal(every, sample(labelled, Recipe(labels=(0, 1, 2, 3)), range(4)))


def test_guidance_is_two_calls_and_the_line_through_them(labelled: Engine) -> None:
    # Ho & Salimans 2022, Eq. 6, in the words of `--guidance`: u + s (c - u).
    y = np.array([2, 0], dtype=np.int64)
    null = np.array([4, 4], dtype=np.int64)

    def predict(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        c, u = labelled(x, t, y=y), labelled(x, t, y=null)
        return u + 3.0 * (c - u)

    noise = SeededNoise(0, range(2), (1, 8, 8))
    *_, last = denoise(predict, labelled.spec.table("ddpm"), noise)
    guided = sample(labelled, Recipe(labels=(2, 0), guidance=3.0), range(2))
    np.testing.assert_array_equal(guided, last.x)
    plain = sample(labelled, Recipe(labels=(2, 0)), range(2))
    assert np.abs(guided - plain).max() > 1e-3


@pytest.mark.parametrize("label", [-1, 5, 100])
def test_a_label_out_of_range_is_refused_before_the_folder_is_made(
    tmp_path: Path, labelled: Engine, label: int
) -> None:
    with pytest.raises(EngineInputError) as caught:
        draw(tmp_path / "run", labelled, Recipe(labels=(0, label)))
    assert str(caught.value) == (
        f"The label is {label}; this network has labels 0..3 and 4 for none."
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("recipe", [Recipe(labels=(0,)), Recipe(guidance=2.0)])
def test_an_unconditional_network_takes_neither_labels_nor_guidance(
    engine: Engine, recipe: Recipe
) -> None:
    with pytest.raises(EngineInputError, match="is unconditional: it takes neither labels nor"):
        sample(engine, recipe, [0])


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_guidance_that_is_not_finite_is_refused_before_the_folder_is_made(
    tmp_path: Path, labelled: Engine, scale: float
) -> None:
    with pytest.raises(EngineInputError, match=f"The guidance is {scale}; it must be finite"):
        draw(tmp_path / "run", labelled, Recipe(guidance=scale))
    assert not (tmp_path / "run").exists()


def test_guidance_needs_a_null_label(tmp_path: Path) -> None:
    spec = tiny_spec(classes=3)
    spec = replace(spec, conditions=(replace(spec.conditions[0], null=None),))
    network = open_engine(write_graph(tmp_path / "unet.onnx", spec))
    with pytest.raises(EngineInputError, match="has no null label"):
        sample(network, Recipe(guidance=2.0), [0])
    assert sample(network, Recipe(labels=(2,)), [0]).shape == (1, 1, 8, 8)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe(steps=21), "steps is 21; this schedule has 1 to 20"),
        (Recipe(steps=0), "steps is 0"),
        (Recipe(sampler="ddim", eta=1.5), r"eta is 1.5; it must lie in \[0, 1\]"),
        (Recipe(sampler="ddim", eta=float("nan")), "eta is nan"),
        (Recipe(eta=0.5), "eta belongs to ddim"),
        (Recipe(sampler="euler"), "sampler is 'euler'; there are ddpm, ddim, dome272"),  # type: ignore[arg-type]
        (Recipe(spacing="even"), "spacing is 'even'; there are leading"),  # type: ignore[arg-type]
        (Recipe(sampler="dome272", steps=5), "neither a stride nor eta"),
    ],
)
def test_settings_out_of_range_are_refused(engine: Engine, recipe: Recipe, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(engine, recipe, [0])


class Stub(Engine):
    """A network written in Python."""

    name = "stub"

    def __init__(self, path: Path, spec: ModelSpec, bad: float, at: int, image: int) -> None:
        path.write_bytes(b"stub")
        self.path, self.spec = path, spec
        self.bad, self.at, self.image = bad, at, image
        self.noise = SeededNoise(0, [image], spec.sample_shape)(0)[0]

    def _run(self, feeds: object) -> np.ndarray:
        assert isinstance(feeds, dict)
        x, t = feeds["x"], feeds["t"]
        out = np.tanh(x)
        if t[0] == self.at:
            out[min(self.image, len(x) - 1)] = self.bad
        return np.asarray(out)

    def describe(self) -> dict[str, object]:
        return {**super().describe(), "runtime": "stub 1"}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_output_that_is_not_finite_is_an_error_even_where_clipping_would_hide_it(
    tmp_path: Path, bad: float
) -> None:
    stub = Stub(tmp_path / "stub", tiny_spec(), bad, at=4, image=1)
    with pytest.raises(EngineError) as caught:
        draw(tmp_path / "run", stub, count=2, batch=2)
    assert str(caught.value) == "stub gave numbers that are not finite at t = 4 (step 16)."
    assert "ddpm-deploy verify" in caught.value.hint
    assert list((tmp_path / "run").glob("0*")) == []


def test_batches_before_a_failing_one_stay(tmp_path: Path, engine: Engine) -> None:
    calls = 0

    class Failing(Stub):
        def _run(self, feeds: object) -> np.ndarray:
            nonlocal calls
            calls += 1
            self.at = 0 if calls > 20 else -1
            return super()._run(feeds)

    stub = Failing(tmp_path / "stub", tiny_spec(), float("nan"), at=0, image=0)
    with pytest.raises(EngineError, match="not finite"):
        draw(tmp_path / "run", stub, count=4, batch=2)
    assert list(pictures(tmp_path / "run")) == ["000000.png", "000001.png"]


def test_samples_that_are_no_pictures_are_numpy_files(tmp_path: Path) -> None:
    spec = replace(tiny_spec(), sample_shape=(6, 16), clip=None)
    sequence = open_engine(write_sequence(tmp_path / "policy.onnx", spec))
    run = Run(folder=tmp_path / "run", engine=sequence, recipe=Recipe(), count=3, batch=2)
    run.prepare()
    assert [path.name for path in run.draw(on_step=lambda _: None)] == [
        "000000.npy",
        "000001.npy",
        "000002.npy",
    ]
    assert [path.name for path in run.finish({})] == ["run.json"]
    drawn = sample(sequence, Recipe(), range(3))
    for i in range(3):
        saved = np.load(tmp_path / "run" / f"00000{i}.npy")
        assert saved.dtype == np.float32
        np.testing.assert_array_equal(saved, drawn[i])
    run.write_npz(tmp_path / "samples.npz")
    with np.load(tmp_path / "samples.npz") as archive:
        np.testing.assert_array_equal(archive["images"], drawn)
        assert sorted(archive) == ["images", "index"]
    assert run.missing() == 0


def write_sequence(path: Path, spec: ModelSpec) -> Path:
    """Writes out = tanh(x), for samples of any shape, as an ONNX file."""
    shape: list[str | int | None] = ["batch", *spec.sample_shape]
    graph = helper.make_graph(
        [
            helper.make_node("Tanh", ["x"], ["tanh"]),
            helper.make_node("Cast", ["t"], ["unused"], to=TensorProto.FLOAT),
            helper.make_node("Identity", ["tanh"], ["out"]),
        ],
        "tiny",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, shape),
            helper.make_tensor_value_info("t", TensorProto.INT64, ["batch"]),
        ],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, shape)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(model, {METADATA_KEY: spec.to_json()})
    onnx.save_model(model, path)
    return path


def test_the_archive_holds_what_the_pictures_hold(tmp_path: Path, labelled: Engine) -> None:
    run = Run(
        folder=tmp_path / "run",
        engine=labelled,
        recipe=Recipe(labels=(3, 1)),
        start=5,
        count=4,
        batch=3,
    )
    run.prepare()
    list(run.draw(on_step=lambda _: None))
    run.write_npz(tmp_path / "samples.npz")
    with np.load(tmp_path / "samples.npz") as archive:
        assert archive["images"].shape == (4, 8, 8, 1)
        assert archive["images"].dtype == np.uint8
        for i, image in zip(run.images, archive["images"], strict=True):
            np.testing.assert_array_equal(np.asarray(Image.open(run.path(i))), image[..., 0])
        assert archive["index"].tolist() == [5, 6, 7, 8]
        assert archive["labels"].tolist() == [1, 3, 1, 3]


def test_the_animation_unfolds_x0_and_ends_with_the_images(tmp_path: Path, engine: Engine) -> None:
    folder = tmp_path / "run"
    gif = folder / GIF_NAME
    draw(folder, engine, count=3, gif=gif)
    with Image.open(gif) as animation, Image.open(folder / "grid.png") as sheet:
        assert getattr(animation, "n_frames", 1) <= 21  # equal frames in a row become one
        assert getattr(animation, "n_frames", 1) > 10
        animation.seek(animation.n_frames - 1)  # type: ignore[attr-defined]
        np.testing.assert_array_equal(np.asarray(animation.convert("L")), np.asarray(sheet))
    gif.unlink()
    before = pictures(folder)
    assert draw(folder, engine, count=3, gif=gif) == []  # the animation alone is made again
    assert gif.exists()
    assert pictures(folder) == before


@pytest.mark.parametrize(
    ("shape", "batch"),
    [((3, 64, 64), 1), ((3, 32, 32), 4), ((1, 8, 8), 64), ((3, 512, 512), 1), ((7,), 64)],
)
def test_the_default_batch_fits_a_small_machine(shape: Sequence[int], batch: int) -> None:
    spec = ModelSpec(sample_shape=tuple(shape), schedule=linear(10))
    assert default_batch(spec) == batch


def test_an_engine_that_was_built_for_a_batch_is_given_it(engine: Engine) -> None:
    assert batch_for(engine) == default_batch(engine.spec)
    engine.best_batch = 5
    assert batch_for(engine) == 5


def test_overwrite_removes_no_picture_that_the_run_did_not_make(
    tmp_path: Path, engine: Engine
) -> None:
    folder = tmp_path / "run"
    draw(folder, engine, count=4)
    draw(folder, engine, start=10, count=2)
    draw(folder, engine, count=2)  # a part of it again
    photo = folder / "20240101.png"
    photo.write_bytes(b"a holiday")
    draw(folder, engine, Recipe(seed=1), count=1, overwrite=True)
    assert sorted(p.name for p in folder.glob("*.png")) == [
        "000000.png",
        "20240101.png",
        "grid.png",
    ]
    assert photo.read_bytes() == b"a holiday"


def test_a_run_goes_on_with_the_batch_it_began_with(tmp_path: Path, engine: Engine) -> None:
    assert recorded_batch(tmp_path) is None
    draw(tmp_path, engine, count=4, batch=3)
    assert recorded_batch(tmp_path) == 3


@pytest.mark.parametrize(
    "damage", [{"batch": 0}, {"batch": "many"}, {"images": [4, 4]}, {"images": 8}, {"identity": 1}]
)
def test_a_report_that_makes_no_sense_is_damaged(
    tmp_path: Path, engine: Engine, damage: dict[str, object]
) -> None:
    draw(tmp_path, engine, count=1)
    report = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**report, **damage}))
    with pytest.raises(RunError, match=r"run\.json is damaged"):
        draw(tmp_path, engine, count=2)
    draw(tmp_path, engine, count=2, overwrite=True)


def test_given_betas_survive_run_json_bit_for_bit(tmp_path: Path) -> None:
    spec = replace(tiny_spec(), schedule=Schedule(np.geomspace(1e-3, 0.3, 12)))
    draw(tmp_path / "run", open_engine(write_graph(tmp_path / "unet.onnx", spec)), count=1)
    report = json.loads((tmp_path / "run" / "run.json").read_text())
    assert ModelSpec.from_dict(report["spec"]).schedule == spec.schedule


# --- The step fused behind the network ---


@pytest.fixture
def fused(tmp_path: Path) -> Engine:
    return open_engine(write_fused(tmp_path / "fused.onnx", tiny_spec(classes=4)))


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(seed=3),
        Recipe(sampler="ddim", steps=7, eta=0.5, labels=(2, 4)),
        Recipe(guidance=2.0, steps=5),
    ],
)
def test_a_fused_engine_draws_the_same_images(
    tmp_path: Path, labelled: Engine, fused: Engine, recipe: Recipe
) -> None:
    draw(tmp_path / "plain", labelled, recipe)
    draw(tmp_path / "run", fused, recipe)
    assert pictures(tmp_path / "run") == pictures(tmp_path / "plain")
    np.testing.assert_array_equal(
        sample(fused, recipe, range(2, 5)), sample(labelled, recipe, range(2, 5))
    )


def test_the_fused_step_is_used_unless_guidance_comes_before_it(
    fused: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(self: Engine, *arguments: object, **conditions: object) -> None:
        raise AssertionError("the network alone was called")

    monkeypatch.setattr(type(fused), "__call__", call)
    assert np.isfinite(sample(fused, Recipe(), [0])).all()
    with pytest.raises(AssertionError):
        sample(fused, Recipe(guidance=2.0), [0])


def test_x0_unfolds_behind_a_fused_step_as_before_it(
    tmp_path: Path, labelled: Engine, fused: Engine
) -> None:
    for name, engine in (("plain", labelled), ("fused", fused)):
        draw(tmp_path / name, engine, gif=tmp_path / name / GIF_NAME)
    assert (tmp_path / "fused" / GIF_NAME).read_bytes() == (
        tmp_path / "plain" / GIF_NAME
    ).read_bytes()
    assert pictures(tmp_path / "fused") == pictures(tmp_path / "plain")


@pytest.mark.parametrize("gif", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_output_that_is_not_finite_is_an_error_behind_a_fused_step_too(
    tmp_path: Path, bad: float, gif: bool
) -> None:
    engine = open_engine(write_fused(tmp_path / "fused.onnx", tiny_spec(), bias=bad))
    with pytest.raises(EngineError, match="onnxruntime CPU gave numbers that are not") as caught:
        draw(tmp_path / "run", engine, gif=tmp_path / GIF_NAME if gif else None)
    assert "ddpm-deploy verify --engine" in caught.value.hint
    assert list((tmp_path / "run").glob("0*")) == []
    assert not (tmp_path / GIF_NAME).exists()


def test_a_run_that_is_left_leaves_no_thread(tmp_path: Path, fused: Engine) -> None:
    def on_step(k: int) -> None:
        if k == 5:
            raise KeyboardInterrupt

    run = Run(folder=tmp_path / "run", engine=fused, recipe=Recipe(), count=2)
    run.prepare()
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        list(run.draw(on_step=on_step))
    assert threading.active_count() == before


def test_steps_are_counted_from_the_noisiest(tmp_path: Path, engine: Engine, fused: Engine) -> None:
    for name, each in (("plain", engine), ("fused", fused)):
        steps: list[int] = []
        run = Run(folder=tmp_path / name, engine=each, recipe=Recipe(), count=3, batch=2)
        run.prepare()
        list(run.draw(on_step=steps.append))
        assert steps == [*range(1, 21), *range(1, 21)]
