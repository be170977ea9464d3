from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import onnx
import pytest

from ddpm_deploy.runtime import METADATA_KEY, RuntimeRecord
from tests.commands import Outcome, contents, refusal, run
from tests.support import tiny_spec, write_checkpoint, write_fused, write_graph, write_state_dict

QUICK = ["--steps", "3", "--repeat", "2", "--warm-up", "1", "--threads", "1", "--no-memory"]

FIELDS = {
    "name",
    "batch",
    "steps",
    "median",
    "p90",
    "steps_per_second",
    "loop",
    "images_per_second",
    "overhead",
    "ratio",
    "error",
    "error_against",
    "kind",
    "precision",
    "path",
    "size",
    "peak_memory",
    "load",
    "cold_start",
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with engines in it, in which every command runs."""
    monkeypatch.chdir(tmp_path)
    write_graph(Path("unet.onnx"), tiny_spec())
    write_graph(Path("other.onnx"), tiny_spec())
    return tmp_path


@pytest.fixture(autouse=True)
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which nothing else runs, so that no note says otherwise."""
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))


def bench(*arguments: object) -> Outcome:
    return run("bench", *QUICK, *arguments)


def test_each_engine_has_its_figures() -> None:
    outcome = bench("-e", "unet.onnx", "-e", "other.onnx", "--batch", 2, "--json")
    assert outcome.code == 0, outcome
    report = json.loads(outcome.out)
    assert report["tool"].startswith("ddpm-deploy ")
    assert (report["threads"], report["machine"]["cores"] > 0) == (1, True)
    first, second = report["results"]
    assert [r["name"] for r in (first, second)] == [
        "onnxruntime CPU unet.onnx",
        "onnxruntime CPU other.onnx",
    ]
    for result in report["results"]:
        assert result.keys() == FIELDS
        assert (result["batch"], result["steps"]) == (2, 6)
        assert 0 < result["median"] <= result["p90"]
        assert result["steps_per_second"] == pytest.approx(1 / result["median"])
        assert result["images_per_second"] == pytest.approx(2 / (20 * result["median"]))
        assert 0 < result["overhead"] < 1
        assert result["loop"] == pytest.approx(20 * result["median"])
        assert result["ratio"] == first["median"] / result["median"]
        assert result["error"] == 0  # they are one network
        assert result["size"] == Path(result["path"]).stat().st_size
        assert result["peak_memory"] is result["load"] is None
    assert first["ratio"] == 1
    assert report["runtimes"]["onnxruntime"] == metadata.version("onnxruntime")
    assert report["failed"] == []


def test_the_torch_loop_comes_first_and_the_ratios_are_to_it() -> None:
    write_checkpoint(Path("ckpt.pt"))
    outcome = bench("--against", "ckpt.pt", "--json")
    first, second = json.loads(outcome.out)["results"]
    assert (first["name"], second["name"]) == ("torch CPU loop", "onnxruntime CPU unet.onnx")
    assert (first["ratio"], first["overhead"]) == (1, 0)
    assert (first["error"], second["error_against"]) == (0, "torch CPU loop")
    assert second["error"] > 0.1  # the graph by hand is another network
    assert second["ratio"] == first["median"] / second["median"]


def test_the_table_has_the_columns_and_fits_80() -> None:
    outcome = bench("-e", "unet.onnx", "-e", "other.onnx")
    lines = outcome.out.splitlines()
    assert lines[0].rstrip() == "batch 1, 20 steps an image"
    for column in ("loop", "step ms", "p90", "loop s", "images/s", "error", "ratio"):
        assert column in lines[2]
    second = lines.index("batch 1, what it takes")
    for column in ("loop", "memory", "load s", "start s", "on disk", "loop's own"):
        assert column in lines[second + 2]
    assert max(map(len, lines)) <= 80
    assert "e+" not in outcome.out
    assert outcome.err == "timing at batch 1: 2 x 2 turns of 3 steps\n"


def test_engines_of_one_file_name_are_kept_apart() -> None:
    for name in ("a", "b"):
        Path(name).mkdir()
        write_graph(Path(name, "unet.onnx"), tiny_spec())
    report = json.loads(bench("-e", "a/unet.onnx", "-e", "b/unet.onnx", "--json").out)
    assert [result["name"] for result in report["results"]] == [
        "onnxruntime CPU a/unet.onnx",
        "onnxruntime CPU b/unet.onnx",
    ]
    twice = json.loads(bench("-e", "a/unet.onnx", "-e", "a/unet.onnx", "--json").out)
    assert len(twice["results"]) == 1


def test_images_a_second_count_each_engine_s_own_steps() -> None:
    write_graph(Path("short.onnx"), tiny_spec(timesteps=5))
    outcome = bench("-e", "unet.onnx", "-e", "short.onnx", "--json")
    for result, rows in zip(json.loads(outcome.out)["results"], (20, 5), strict=True):
        assert result["images_per_second"] == pytest.approx(1 / (rows * result["median"]))
    table = bench("-e", "unet.onnx", "-e", "short.onnx").out
    assert table.startswith("batch 1, 20 or 5 steps an image")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-e", "missing.onnx"], "There is no file missing.onnx."),
        (["-e", "unet.plan"], "There is no file unet.plan"),
        (["--against", "other.onnx"], "other.onnx is no checkpoint, so it has no loop in PyTorch."),
        (["--against", "missing.pt"], "There is no file missing.pt."),
        (["--against", "ckpt.pt", "--device", "cuda"], "has no CUDA"),
        (["-e", "ckpt.pt", "--device", "cuda"], "finds no CUDA device."),
    ],
)
def test_what_cannot_be_is_one_message(folder: Path, arguments: list[str], message: str) -> None:
    write_checkpoint(Path("ckpt.pt"))
    before = contents(folder)
    assert message in refusal(bench(*arguments))
    assert contents(folder) == before


def test_each_batch_has_its_table() -> None:
    report = json.loads(bench("--batch", 1, "--batch", 3, "--json").out)
    assert [result["batch"] for result in report["results"]] == [1, 3]
    table = bench("--batch", 1, "--batch", 3).out
    assert "batch 1, 20 steps an image" in table
    assert "batch 3, 20 steps an image" in table


def test_what_cannot_run_says_why_and_stops_nothing() -> None:
    Path("damaged.onnx").write_bytes(b"\xff" * 40)
    arguments = ["-e", "missing.onnx", "-e", "unet.onnx", "-e", "damaged.onnx"]
    outcome = bench(*arguments, "--json")
    assert outcome.code == 0, outcome
    report = json.loads(outcome.out)
    assert [result["name"] for result in report["results"]] == ["onnxruntime CPU unet.onnx"]
    missing, damaged = report["failed"]
    assert (missing["name"], missing["batch"]) == ("missing.onnx", None)
    assert missing["reason"] == "There is no file missing.onnx."
    assert damaged["reason"].startswith("damaged.onnx cannot be read as an ONNX file")
    assert "not timed: missing.onnx: There is no file missing.onnx." in bench(*arguments).out


def test_where_nothing_runs_all_reasons_are_told() -> None:
    message = refusal(bench("-e", "missing.onnx", "-e", "gone.onnx"))
    assert "Nothing could be timed. missing.onnx: There is no file missing.onnx;" in message
    assert "gone.onnx: There is no file gone.onnx." in message


def test_peers_run_the_plain_graph_in_the_same_turns(exported: Path) -> None:
    outcome = bench(
        *("-e", exported / "unet.onnx", "--against", exported / "ckpt.pt", "--peers", "--json"),
        *("--engines", "torch,onnxruntime,openvino,diffusers"),
    )
    assert outcome.code == 0, outcome
    report = json.loads(outcome.out)
    assert [result["name"] for result in report["results"]] == [
        "torch CPU loop",
        "onnxruntime plain",
        "openvino plain",
        "onnxruntime CPU unet.onnx",
    ]
    for result in report["results"]:
        assert result["steps"] == 6
        assert result["error"] < 2e-5  # all are one network, in float32
    (diffusers,) = report["failed"]
    assert "ckpt.pt is no diffusers pipeline" in diffusers["reason"]


def test_peers_say_what_they_need() -> None:
    write_fused(Path("fused.onnx"), tiny_spec())
    report = json.loads(bench("-e", "fused.onnx", "--peers", "--json").out)
    assert [result["kind"] for result in report["results"]] == ["engine"]
    reasons = {failed["name"]: failed["reason"] for failed in report["failed"]}
    for name in ("torch loop", "torch.compile loop", "diffusers pipeline"):
        assert reasons[name] == "It needs the checkpoint."
    for name in ("onnxruntime plain", "openvino plain"):
        assert reasons[name] == "It needs the graph as export wrote it."


def test_rows_are_chosen_by_runtime_and_precision() -> None:
    write_checkpoint(Path("ckpt.pt"))
    built = RuntimeRecord(runtime="openvino", precision="bf16").to_json()
    write_record(Path("built.onnx"), built)
    arguments = ["--against", "ckpt.pt", "-e", "unet.onnx", "-e", "built.onnx", "--json"]

    def kept(names: str) -> list[str]:
        return [r["name"] for r in json.loads(bench(*arguments, "--engines", names).out)["results"]]

    assert kept("bf16") == ["openvino CPU bf16 built.onnx"]
    assert kept("torch, onnxruntime") == ["torch CPU loop", "onnxruntime CPU unet.onnx"]
    outcome = bench(*arguments, "--engines", "tensorrt")
    assert (outcome.code, outcome.out) == (2, "")
    assert "'tensorrt' is no row's runtime or precision" in " ".join(outcome.err.split())


def write_record(path: Path, record: str) -> None:
    write_graph(path, tiny_spec())
    model = onnx.load_model(path)
    model.metadata_props.add(key=METADATA_KEY, value=record)
    onnx.save_model(model, path)


def test_memory_and_start_are_those_of_a_process_alone() -> None:
    outcome = bench("-e", "unet.onnx", "-e", "missing.onnx", "--memory", "--json")
    assert outcome.code == 0, outcome
    report = json.loads(outcome.out)
    (result,) = report["results"]
    assert 1e6 < result["peak_memory"] < 1e9  # ONNX Runtime's library is some 20 MB
    assert 0 < result["load"] < result["cold_start"]
    (missing,) = report["failed"]  # once, though its own process and this one found it
    assert missing["reason"] == "There is no file missing.onnx."


def test_a_process_that_dies_takes_its_row_alone(folder: Path) -> None:
    write_graph(Path("unet.onnx"), tiny_spec().with_changes(family="own"))
    write_state_dict(Path("ckpt.pt"))
    Path("deadly.py").write_text("import os\n\ndef make():\n    os.kill(os.getpid(), 9)\n")
    arguments = ["-e", "unet.onnx", "-e", "ckpt.pt", "--model", "deadly:make"]
    outcome = bench(*arguments, "--memory", "--json")
    assert outcome.code == 0, outcome
    report = json.loads(outcome.out)
    assert [result["name"] for result in report["results"]] == ["onnxruntime CPU unet.onnx"]
    (dead,) = report["failed"]
    assert (dead["name"], dead["reason"]) == ("ckpt.pt", "Its process ended with SIGKILL.")
    assert "smaller --batch" in dead["hint"]


def test_layers_are_those_of_the_graph() -> None:
    report = json.loads(bench("--layers", "--json").out)
    (profile,) = report["layers"]
    assert profile["name"] == "onnxruntime CPU unet.onnx"
    assert {layer["operator"] for layer in profile["layers"]} >= {"Tanh", "Add", "Reshape"}
    seconds = [layer["seconds"] for layer in profile["layers"]]
    assert seconds == sorted(seconds, reverse=True)
    assert sum(profile["operators"].values()) == pytest.approx(sum(seconds))
    table = bench("--layers").out
    assert "onnxruntime CPU unet.onnx, batch 1: by operator" in table
    assert max(map(len, table.splitlines())) <= 80


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_a_chart_shows_each_row_with_its_error(suffix: str) -> None:
    path = Path("speed" + suffix)
    outcome = bench("-e", "unet.onnx", "-e", "other.onnx", "--plot", path)
    assert outcome.code == 0, outcome
    assert outcome.err.endswith(f"chart: {path}\n")
    content = path.read_bytes()
    if suffix == ".png":
        assert content.startswith(b"\x89PNG")
    else:
        for text in (b"onnxruntime CPU other.onnx", b"the reference", b"images a second"):
            assert text in content


def test_a_chart_of_another_form_is_refused_before_the_work() -> None:
    outcome = bench("--plot", "speed.gif")
    assert (outcome.code, outcome.out) == (2, "")
    assert "charts end in .svg or .png" in " ".join(outcome.err.split())


def test_a_busy_machine_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (1e4, 0.0, 0.0))
    assert "note: the machine is busy (load 10000.0" in bench().err


@pytest.mark.parametrize("option", ["--batch", "--steps", "--repeat", "--warm-up", "--threads"])
def test_nothing_to_time_is_wrong_usage(option: str) -> None:
    outcome = bench(option, 0)
    assert (outcome.code, outcome.out) == (2, "")
    assert option in outcome.err
