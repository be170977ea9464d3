from __future__ import annotations

import errno
import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image

from ddpm_deploy import ModelSpec, images, linear
from ddpm_deploy.cli.common import parse_labels
from ddpm_deploy.export.fuse_step import fuse_file
from ddpm_deploy.model.family import label_condition
from tests.commands import Outcome, contents, finish, refusal, run, start
from tests.support import tiny_spec, write_graph

MANY = 400
"""Images that take a second or so: time enough to stop a run in its middle."""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an engine in it, in which every command runs."""
    monkeypatch.chdir(tmp_path)
    write_graph(tmp_path / "unet.onnx", tiny_spec())
    write_graph(tmp_path / "labelled.onnx", tiny_spec(classes=4))
    return tmp_path


def sample(*arguments: object) -> Outcome:
    return run("sample", *arguments)


def pictures(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob("[0-9]*.png"))}


def test_stdout_is_the_paths_and_nothing_else() -> None:
    outcome = sample("-n", 3, "--gif", "--npz")
    assert outcome.code == 0
    assert outcome.out.splitlines() == [
        "samples/000000.png",
        "samples/000001.png",
        "samples/000002.png",
        "samples/grid.png",
        "samples/run.json",
        "samples/x0.gif",
        "samples/samples.npz",
    ]
    assert all(Path(line).is_file() for line in outcome.out.splitlines())
    assert sorted(contents(Path("samples"))) == sorted(
        line.removeprefix("samples/") for line in outcome.out.splitlines()
    )
    assert outcome.err.startswith("sampling on onnxruntime CPU: 20 steps in ")
    assert outcome.err.rstrip().endswith("steps/s")


def test_json_says_what_was_drawn_and_where() -> None:
    assert sample("-n", 2, "-o", "run").code == 0
    outcome = sample("-n", 5, "-o", "run", "--batch", 3, "--json")
    report = json.loads(outcome.out)
    assert report["images"] == [f"run/00000{i}.png" for i in range(5)]
    assert report["files"] == ["run/grid.png", "run/run.json"]
    assert (report["folder"], report["drawn"], report["steps"], report["batch"]) == (
        "run",
        3,
        20,
        3,
    )
    assert report["engine"]["name"] == "onnxruntime CPU"
    assert report["seconds"] > 0
    timing = json.loads(Path("run/run.json").read_text())["timing"]
    assert timing["seconds to the first step"] > 0  # from the start of the process
    sample("-n", 5, "-o", "run", "--batch", 3)  # which draws nothing
    assert "seconds to the first step" not in Path("run/run.json").read_text()
    assert "run holds 2 of 5 images; 3 to draw" in outcome.err


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_a_seed_gives_the_same_image_in_any_batch(batch: int) -> None:
    sample("-n", 7, "-o", "one", "--seed", 7)
    sample("-n", 7, "-o", "other", "--seed", 7, "--batch", batch)
    assert pictures("one") == pictures("other")
    assert len(set(pictures("one").values())) == 7


def test_a_finished_run_is_left_as_it_is() -> None:
    sample("-n", 3, "-o", "run")
    before = {path: path.stat().st_mtime_ns for path in Path("run").glob("0*")}
    outcome = sample("-n", 3, "-o", "run")
    assert outcome.code == 0
    assert "run holds 3 of 3 images; 0 to draw" in outcome.err
    assert {path: path.stat().st_mtime_ns for path in before} == before


def stop(*, by: signal.Signals, n: int = MANY) -> tuple[Outcome, dict[str, tuple[int, bytes]]]:
    """Stops a run when a few images exist; returns what it said, and its images with mtimes."""
    process = start("sample", "-n", n, "-o", "run", "--batch", 2, "--threads", 1)
    deadline = time.monotonic() + 60
    while len(list(Path("run").glob("0*.png"))) < 5:
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(by)
    outcome = finish(process)
    there = sorted(Path("run").glob("0*.png"))
    return outcome, {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in there}


def check_that_it_continues(before: dict[str, tuple[int, bytes]]) -> None:
    assert 5 <= len(before) < MANY
    outcome = sample("-n", MANY, "-o", "run", "--batch", 2)
    assert outcome.code == 0
    assert f"run holds {len(before)} of {MANY} images; {MANY - len(before)} to draw" in outcome.err
    after = {name: (Path("run") / name).stat().st_mtime_ns for name in before}
    assert after == {name: mtime for name, (mtime, _) in before.items()}
    sample("-n", MANY, "-o", "whole", "--batch", 64)
    assert pictures("run") == pictures("whole")
    assert contents(Path("run")).keys() == contents(Path("whole")).keys() | {
        name for name in contents(Path("run")) if name.startswith(".run.")
    }


def test_a_killed_run_continues_and_draws_nothing_twice() -> None:
    outcome, before = stop(by=signal.SIGKILL)
    assert outcome.code == -signal.SIGKILL
    for _, content in before.values():
        assert content.endswith(b"IEND\xaeB`\x82")  # a PNG to its end
    assert json.loads(Path("run/run.json").read_text())["finished"] is False
    # What a kill in the middle of a write leaves behind counts for nothing.
    name = f"{len(before):06d}"
    Path(f"run/.{name}.0a1b2c3d.part.png").write_bytes(b"\x89PNG")
    check_that_it_continues(before)


@pytest.mark.parametrize("fused", [False, True])
def test_ctrl_c_says_how_to_continue(fused: bool) -> None:
    if fused:  # noise is drawn in a thread then
        fuse_file(Path("unet.onnx"), Path("unet.onnx"))
    outcome, before = stop(by=signal.SIGINT)
    assert outcome.code == 130
    assert outcome.out == ""
    assert outcome.err == (
        f"{len(before)} of {MANY} images are in run; the same command continues\n"
    )
    assert not list(Path("run").glob(".*"))
    check_that_it_continues(before)


@pytest.mark.parametrize(
    ("arguments", "differing"),
    [
        (["--seed", "1"], "seed was 0, is 1"),
        (["--sampler", "ddim"], "sampler was ddpm, is ddim"),
        (["--steps", "4"], "steps was 20, is 4"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(
    folder: Path, arguments: list[str], differing: str
) -> None:
    sample("-n", 2, "-o", "run")
    before = contents(folder)
    outcome = sample("-n", 2, "-o", "run", *arguments)
    assert refusal(outcome) == f"run holds another run: {differing}."
    assert " hint: Name another folder with -o, or type --overwrite" in outcome.err
    assert contents(folder) == before
    assert sample("-n", 2, "-o", "run", *arguments, "--overwrite").code == 0


def test_pictures_of_somebody_else_are_refused(folder: Path) -> None:
    Path("album").mkdir()
    Path("album/000000.png").write_bytes(b"mine")
    before = contents(folder)
    assert "album holds 000000.png but no run.json" in refusal(sample("-o", "album"))
    assert contents(folder) == before


def test_labels_and_guidance_reach_the_network() -> None:
    settings: dict[str, list[str]] = {
        "plain": [],
        "threes": ["--label", "3"],
        "turns": ["--label", "0,1,2,3"],
        "none": ["--label", "none"],
        "guided": ["--label", "3", "--guidance", "4"],
    }
    for out, arguments in settings.items():
        outcome = sample("-e", "labelled.onnx", "-n", 4, "-o", out, *arguments)
        assert outcome.code == 0
    assert pictures("plain") == pictures("turns")
    assert pictures("threes")["000003.png"] == pictures("turns")["000003.png"]
    assert pictures("threes")["000000.png"] != pictures("turns")["000000.png"]
    alike = [pictures(out) for out in ("threes", "none", "guided")]
    assert alike[0] != alike[1] != alike[2] != alike[0]
    said = json.loads(Path("none/run.json").read_text())["identity"]
    assert said["labels"] == [4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-e", "missing.onnx"], "There is no file missing.onnx."),
        (["-e", "unet.plan"], "There is no file unet.plan"),
        (["-e", "notes.txt"], "notes.txt is not an engine: its suffix is '.txt'."),
        (["-e", "."], ". is a folder; an engine is a file."),
        (["-e", "garbage.onnx"], "garbage.onnx cannot be read as an ONNX file"),
        (["-e", "empty.onnx"], "cannot load empty.onnx"),
        (["-e", "short.onnx"], "short.onnx cannot be read as an ONNX file"),
        (["-e", "bare.onnx"], "bare.onnx carries no ddpm-deploy spec"),
        (["-e", "later.onnx"], "The spec in later.onnx has format 99"),
        (["-e", "damaged.onnx"], "The spec in damaged.onnx is damaged (not JSON"),
        (["-e", "wrong.onnx"], "wrong.onnx has the inputs t int64 (N), x float32"),
        (["-e", "larger.onnx"], "but its spec says t int64 (N), x float32 (N, 1, 16"),
        (["--label", "0"], "unet.onnx is unconditional: it takes neither labels nor guidance."),
        (["--guidance", "2"], "unet.onnx is unconditional"),
        (["-e", "labelled.onnx", "--label", "7"], "The label is 7; this network has labels 0..3"),
        (["-e", "labelled.onnx", "--label", "0,-1"], "The label is -1; this network"),
        (["--steps", "21"], "Steps is 21; this schedule has 1 to 20."),
        (["--sampler", "ddim", "--eta", "1.5"], "Eta is 1.5; it must lie in [0, 1]."),
        (["--sampler", "ddim", "--eta", "nan"], "Eta is nan; it must lie in [0, 1]."),
        (["--eta", "0.5"], "Eta belongs to ddim; ddpm's noise is fixed by its variance."),
        (["--sampler", "euler"], "Sampler is 'euler'; there are ddpm, ddim, dome272, dpmpp_2m."),
        (["--spacing", "even"], "Spacing is 'even'; there are leading, linspace, trailing, trai"),
        (["--device", "cuda"], "has no CUDA"),
        (["--device", "tpu"], "The device is 'tpu'; there are auto, cpu and cuda."),
        (["-o", "unet.onnx"], "A file stands where a folder is needed: unet.onnx."),
        (["-o", "unet.onnx/run"], "Not a directory: unet.onnx/run"),
        (["-o", "/proc/run"], "/proc/run"),
        (["-o", "/dev/full"], "A file stands where a folder is needed: /dev/full."),
        (["-o", "x" * 300], "File name too long"),
    ],
)
def test_what_cannot_be_is_one_message_and_leaves_nothing(
    folder: Path, arguments: list[str], message: str
) -> None:
    write_wrong_files()
    before = contents(folder)
    outcome = sample(*arguments)
    assert message in refusal(outcome)
    assert contents(folder) == before


def write_wrong_files() -> None:
    Path("notes.txt").write_text("notes")
    Path("garbage.onnx").write_bytes(b"garbage")
    Path("empty.onnx").write_bytes(b"")
    Path("short.onnx").write_bytes(Path("unet.onnx").read_bytes()[:400])
    write_graph(Path("bare.onnx"), None)
    content = write_graph(Path("wrong.onnx"), tiny_spec()).read_bytes()
    later = tiny_spec().to_json().replace('"format": 2', '"format": 99')
    later = later.replace(tiny_spec().tool_version, "9.9")
    for name, spec in [
        ("later.onnx", later),
        ("damaged.onnx", "{"),
        ("wrong.onnx", tiny_spec(classes=4).to_json()),
        ("larger.onnx", tiny_spec(size=16).to_json()),
    ]:
        write_spec(Path(name), content, spec)


def write_spec(path: Path, content: bytes, spec: str) -> None:
    """Writes a graph with another text as its spec."""
    import onnx

    model = onnx.load_model_from_string(content)
    model.metadata_props[0].value = spec
    onnx.save_model(model, path)


@pytest.mark.parametrize(
    "arguments",
    [
        ["-n", "0"],
        ["-n", "-1"],
        ["-n", "x"],
        ["-n", "1.5"],
        ["--seed", "-1"],
        ["--seed", str(1 << 64)],
        ["--batch", "0"],
        ["--steps", "0"],
        ["--start", "-1"],
        ["--threads", "0"],
        ["--label", "x"],
        ["--label", "none"],  # an unconditional network has no such label
        ["--label", ""],
        ["--guidance", "x"],
        ["--no-such-option"],
        ["surplus"],
    ],
)
def test_wrong_usage_exits_with_2_and_leaves_nothing(folder: Path, arguments: list[str]) -> None:
    before = contents(folder)
    outcome = sample(*arguments)
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err.startswith("Usage: ")
    assert "Error" in outcome.err
    assert "Traceback" not in outcome.err
    assert contents(folder) == before


def test_the_largest_seed_and_index_work() -> None:
    assert sample("-n", 1, "--seed", (1 << 64) - 1, "--start", 123456789).code == 0
    assert list(pictures("samples")) == ["123456789.png"]


def test_an_index_past_the_end_is_refused(folder: Path) -> None:
    before = contents(folder)
    assert "2^64" in refusal(sample("-n", 2, "--start", (1 << 64) - 1))
    assert contents(folder) == before


def test_no_gif_of_what_is_no_picture(folder: Path) -> None:
    write_graph(Path("planes.onnx"), replace(tiny_spec(), sample_shape=(2, 8, 8)))
    before = contents(folder)
    assert refusal(sample("-e", "planes.onnx", "--gif")) == (
        "These samples are no pictures, so there is no --gif."
    )
    assert contents(folder) == before
    outcome = sample("-e", "planes.onnx", "-n", 2, "--npz")
    assert outcome.out.splitlines() == [
        "samples/000000.npy",
        "samples/000001.npy",
        "samples/run.json",
        "samples/samples.npz",
    ]


def test_a_network_that_gives_nan_is_an_error_and_writes_no_image() -> None:
    write_graph(Path("nan.onnx"), tiny_spec(), bias=float("nan"))
    outcome = sample("-e", "nan.onnx", "-n", 3)
    assert refusal(outcome) == (
        "onnxruntime CPU gave numbers that are not finite at t = 19 (step 1)."
    )
    assert "ddpm-deploy verify --engine nan.onnx" in outcome.err
    assert list(contents(Path("samples"))) == ["run.json"]


def test_a_network_that_ignores_its_spec_is_an_error() -> None:
    spec = replace(tiny_spec(), variance="learned_range")
    write_graph(Path("narrow.onnx"), spec)
    assert "narrow.onnx gives (2, 1, 8, 8); its spec says (2, 2, 8, 8)." in refusal(
        sample("-e", "narrow.onnx", "-n", 2)
    )


FULL = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
sys.argv = ["ddpm-deploy", *sys.argv[1:]]
runpy.run_module("ddpm_deploy", run_name="__main__")
"""


def test_a_disk_that_fills_up_keeps_what_is_whole_and_continues() -> None:
    # No file may grow past 6000 bytes, which stops an archive but no picture; then a smaller limit.
    full = finish(start("sample", "-n", 200, "--npz", python=["-c", FULL.format(limit=6000)]))
    assert full.code == 2
    errors = [line for line in full.err.splitlines() if line.startswith("error: ")]
    assert errors == ["error: File too large."]
    assert "Traceback" not in full.err
    assert not list(Path("samples").glob(".*"))
    assert not Path("samples/samples.npz").exists()
    assert len(pictures("samples")) == 200
    assert sample("-n", 200, "--npz").code == 0
    with np.load("samples/samples.npz") as archive:
        assert archive["images"].shape == (200, 8, 8, 1)

    full = finish(start("sample", "-n", 4, "-o", "none", python=["-c", FULL.format(limit=10)]))
    assert full.code == 2
    assert "error: File too large." in full.err
    assert contents(Path("none")) == {}


def test_a_disk_that_is_full_for_images_says_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = images.write_png

    def full(path: Path, pixels: np.ndarray) -> None:
        if path.name == "000002.png":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        whole(path, pixels)

    with monkeypatch.context() as patch:
        patch.setattr("ddpm_deploy.run.write_png", full)
        outcome = sample("-n", 4)
    assert refusal(outcome) == "No space left on device."
    assert "2 of 4 images are in samples; the same command continues" in outcome.err
    assert "free some space" in outcome.err
    assert list(pictures("samples")) == ["000000.png", "000001.png"]
    assert sample("-n", 4).code == 0
    assert len(pictures("samples")) == 4


PEAK = """
import resource, sys
from ddpm_deploy.cli.app import app
try:
    app(sys.argv[1:])
finally:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
"""


def test_memory_does_not_grow_with_the_number_of_images() -> None:
    spec = tiny_spec(timesteps=1)
    write_graph(Path("quick.onnx"), spec)
    peaks = {}
    for n in (50, 2000):
        arguments = [
            "-e",
            "quick.onnx",
            "-n",
            n,
            "-o",
            f"n{n}",
            "--batch",
            25,
            "--npz",
            "--threads",
            1,
        ]
        outcome = finish(start("sample", *arguments, python=["-c", PEAK]))
        assert outcome.code == 0, outcome.err
        peaks[n] = int(outcome.err.splitlines()[-1]) * 1024
    # 2,000 of these pictures are 512 kB as float32, and their paths as much again.
    assert peaks[2000] < peaks[50] + 8 * 2**20


def test_the_family_s_own_loop_is_the_default() -> None:
    spec = ModelSpec(
        sample_shape=(1, 8, 8),
        schedule=linear(12),
        sampler="dome272",
        clip=None,
        variance="fixed_large",
    )
    write_graph(Path("dome.onnx"), spec)
    sample("-e", "dome.onnx", "-n", 2, "-o", "own")
    sample("-e", "dome.onnx", "-n", 2, "-o", "named", "--sampler", "dome272")
    assert pictures("own") == pictures("named")
    assert json.loads(Path("own/run.json").read_text())["identity"]["steps"] == 11
    assert "neither a stride nor eta" in refusal(sample("-e", "dome.onnx", "-o", "x", "--steps", 3))


def test_the_grid_shows_the_images() -> None:
    sample("-n", 2)
    sheet = np.asarray(Image.open("samples/grid.png"))
    for i, left in enumerate((2, 68)):
        image = np.asarray(Image.open(f"samples/00000{i}.png"))
        np.testing.assert_array_equal(
            sheet[2:66, left : left + 64], image.repeat(8, 0).repeat(8, 1)
        )


def test_a_reader_that_leaves_early_is_no_error() -> None:
    process = start("sample", "-n", 3)
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    err = finish(process).err
    assert "Traceback" not in err
    assert "BrokenPipe" not in err
    assert len(pictures("samples")) == 3


@pytest.mark.parametrize(
    ("names", "text", "labels"),
    [
        (("cat", "dog"), "dog", (1,)),
        (("cat", "dog"), "dog, cat,0", (1, 0, 0)),
        (("1", "10", "2"), "10,2", (1, 2)),
        ((), "1,0", (1, 0)),
        (("cat", "dog"), "none", (2,)),
    ],
)
def test_a_class_is_asked_for_by_its_name(
    names: tuple[str, ...], text: str, labels: tuple[int, ...]
) -> None:
    spec = tiny_spec(classes=len(names) or 2)
    spec = spec.with_changes(conditions=(label_condition(len(names) or 2, names),))
    assert parse_labels(text, spec) == labels


@pytest.mark.parametrize(("names", "text"), [(("cat", "dog"), "cow"), (("1", "10"), "0")])
def test_a_class_that_is_not_there_is_told_those_that_are(
    names: tuple[str, ...], text: str
) -> None:
    spec = tiny_spec().with_changes(conditions=(label_condition(2, names),))
    with pytest.raises(typer.BadParameter, match=f"its classes are {', '.join(names)}"):
        parse_labels(text, spec)
