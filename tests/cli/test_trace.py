from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ddpm_deploy import SeededNoise, denoise, open_engine
from ddpm_deploy.files import sha256
from ddpm_deploy.run import Recipe
from ddpm_deploy.verify import read_trace
from tests.commands import Outcome, contents, finish, refusal, run, start
from tests.support import tiny_spec, write_checkpoint, write_fused, write_graph


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an engine in it, in which every command runs."""
    monkeypatch.chdir(tmp_path)
    write_graph(Path("unet.onnx"), tiny_spec())
    return tmp_path


def trace(*arguments: object) -> Outcome:
    return run("trace", "--threads", 1, *arguments)


def test_a_checkpoint_s_loop_is_recorded_beside_it() -> None:
    Path("model").mkdir()
    write_checkpoint(Path("model/ckpt.pt"))
    outcome = trace("model/ckpt.pt")
    assert (outcome.code, outcome.out) == (0, "model/ckpt.trace\n")
    assert outcome.err.startswith("recording torch CPU: 20 steps in ")
    recorded = read_trace(Path("model/ckpt.trace"))
    assert recorded.spec.checkpoint_sha256 == sha256(Path("model/ckpt.pt"))
    assert recorded.source["sha256"] == sha256(Path("model/ckpt.pt"))
    assert recorded.source["path"] == "model/ckpt.pt"
    assert (recorded.images, list(recorded.steps)) == ((0, 1), list(range(1, 21)))
    assert sorted(p.name for p in Path("model").iterdir()) == ["ckpt.pt", "ckpt.trace"]


def test_the_recorded_numbers_are_those_that_sample_draws() -> None:
    arguments = ["--sampler", "ddim", "--steps", 5, "--eta", 0.5, "--seed", 7, "-n", 3]
    assert trace("unet.onnx", *arguments).code == 0
    recorded = read_trace(Path("unet.trace"))
    assert recorded.recipe == Recipe(sampler="ddim", steps=5, eta=0.5, seed=7)
    with open_engine("unet.onnx") as engine:
        noise = SeededNoise(7, range(3), (1, 8, 8))
        wanted = list(denoise(engine, engine.spec.table("ddim", 5, eta=0.5), noise))
    assert np.array_equal(recorded.final, wanted[-1].x)
    for step in wanted:
        assert np.array_equal(recorded.steps[step.k].x_t, step.x_t)
        assert np.array_equal(recorded.steps[step.k].out, step.out)


def test_the_family_s_own_sampler_is_named_in_the_file() -> None:
    write_graph(Path("own.onnx"), replace(tiny_spec(), sampler="dome272"))
    assert trace("own.onnx").code == 0
    assert read_trace(Path("own.trace")).recipe.sampler == "dome272"


def test_a_fused_step_is_recorded_as_the_runtime_makes_it() -> None:
    write_fused(Path("fused.onnx"), tiny_spec())
    assert (trace("fused.onnx").code, trace("unet.onnx").code) == (0, 0)
    fused, plain = (read_trace(Path(f"{name}.trace")) for name in ("fused", "unet"))
    assert np.array_equal(fused.final, plain.final)  # the same operations in the same order


@pytest.mark.parametrize(
    ("keep", "kept"), [("all", 60), ("2", 2), ("7", 7), ("60", 60), ("99", 60), (None, 50)]
)
def test_so_many_steps_are_kept_as_are_asked_for(keep: str | None, kept: int) -> None:
    write_graph(Path("long.onnx"), tiny_spec(timesteps=60))
    assert trace("long.onnx", *([] if keep is None else ["--keep", keep])).code == 0
    steps = list(read_trace(Path("long.trace")).steps)
    assert len(steps) == kept
    assert (steps[0], steps[-1]) == (1, 60)
    assert max(np.diff(steps)) - min(np.diff(steps)) <= 1


def test_the_same_command_writes_the_same_bytes() -> None:
    trace("unet.onnx", "-o", "a.trace")
    trace("unet.onnx", "-o", "b.trace")
    assert Path("a.trace").read_bytes() == Path("b.trace").read_bytes()


def test_goldens_for_other_tools_are_written_beside_it() -> None:
    outcome = trace("unet.onnx", "--steps", 2, "--polygraphy", "p", "--trtexec", "t")
    first, inputs, outputs, export, compare = outcome.out.splitlines()
    assert [first, inputs, outputs] == ["unet.trace", "p/inputs.json", "p/outputs.json"]
    assert len(json.loads(Path("p/inputs.json").read_text())) == 2
    assert export.startswith("for step in t/step0001 t/step0002; do trtexec ")
    assert "--refPair=1 --loadInputs=x:t/step0002/x.bin,t:t/step0002/t.bin" in compare
    for command in (export, compare):
        assert subprocess.run(["/bin/sh", "-n", "-c", command], check=False).returncode == 0
    assert sorted(p.name for p in Path("t/step0002").iterdir()) == [
        "out.bin",
        "out.json",
        "t.bin",
        "x.bin",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.pt"], "There is no file missing.pt."),
        (["unet.onnx", "--steps", "21"], "Steps is 21; this schedule has 1 to 20."),
        (["unet.onnx", "--sampler", "euler"], "Sampler is 'euler'; there are ddpm"),
        (["unet.onnx", "--label", "1"], "is unconditional: it takes neither labels"),
        (["unet.onnx", "--device", "cuda"], "has no CUDA"),
        (["unet.onnx", "-o", "unet.onnx"], "The output is unet.onnx; the name of a trace ends in"),
        (["unet.onnx", "-o", "unet.onnx/a.trace"], "A file stands where a folder is needed"),
        (["nan.onnx"], "The loop gives numbers that are not finite at t = 19 (step 1)."),
        (
            ["labelled.onnx", "--label", "1", "--guidance", "2", "--polygraphy", "p"],
            "With guidance 2 an output is made of two calls",
        ),
        (["unet.onnx", "--trtexec", "a,b"], "trtexec splits its options at ,"),
        (["unet.onnx", "--polygraphy", "unet.onnx"], "A file stands where a folder is needed"),
    ],
)
def test_what_cannot_be_recorded_is_one_message_and_leaves_nothing(
    folder: Path, arguments: list[str], message: str
) -> None:
    write_graph(Path("nan.onnx"), tiny_spec(), bias=float("nan"))
    write_graph(Path("labelled.onnx"), tiny_spec(classes=4))
    before = contents(folder)
    assert message in refusal(trace(*arguments))
    assert contents(folder) == before


@pytest.mark.parametrize(
    "arguments", [["-n", "0"], ["--keep", "1"], ["--keep", "some"], ["--seed", "-1"]]
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    outcome = trace("unet.onnx", *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("Usage: ")


def test_a_device_s_side_records_without_torch_or_onnx() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'polygraphy'): sys.modules[name] = None\n"
        "from ddpm_deploy.cli.app import main\n"
        "main()"
    )
    arguments = ["trace", "unet.onnx", "--trtexec", "t"]
    outcome = finish(start(*arguments, python=["-c", code]))
    assert outcome.code == 0, outcome
    assert "unet.trace" in outcome.out
    refused = finish(start("trace", "unet.onnx", "--polygraphy", "p", python=["-c", code]))
    assert refusal(refused).startswith("polygraphy is needed here")
