"""`--observe`: what an action network is conditioned on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.commands import refusal, run
from tests.support import conditioned_spec, tiny_spec, write_conditioned, write_graph

OBSERVED = np.arange(12, dtype=np.float64).reshape(2, 2, 3)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_conditioned(Path("net.onnx"), conditioned_spec())
    write_graph(Path("unet.onnx"), tiny_spec())
    np.save("obs.npy", OBSERVED)
    np.save("one.npy", OBSERVED[0])
    return tmp_path


def test_actions_are_drawn_for_the_observations_given() -> None:
    given = run("sample", "-e", "net.onnx", "-n", 4, "--observe", "obs=obs.npy", "-o", "a")
    assert given.code == 0, given.err
    assert given.out.splitlines()[:4] == [f"a/{i:06d}.npy" for i in range(4)]
    assert np.load("a/000000.npy").shape == (4, 6)
    short = run("sample", "-e", "net.onnx", "-n", 1, "--observe", "one.npy", "-o", "b")
    assert short.code == 0, short.err
    assert np.array_equal(np.load("b/000000.npy"), np.load("a/000000.npy"))


def test_a_run_with_other_observations_is_another_run() -> None:
    assert run("sample", "-e", "net.onnx", "-n", 1, "--observe", "obs.npy").code == 0
    np.save("obs.npy", OBSERVED + 1)
    outcome = run("sample", "-e", "net.onnx", "-n", 1, "--observe", "obs.npy")
    assert "samples holds another run: observations was" in refusal(outcome)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "net.onnx is conditioned on obs, float32 (2, 3), and none is given."),
        (["--observe", "no.npy"], "There is no file no.npy."),
        (["--observe", "text.npy"], "text.npy is no NumPy array"),
        (["--observe", "empty.npy"], "empty.npy is no NumPy array"),
        (["--observe", "flat.npy"], "flat.npy is float64 (12,); obs takes float32 (N, 2, 3)."),
        (["--observe", "nan.npy"], "nan.npy has 1 numbers that are not finite."),
        (["--observe", "words.npy"], "words.npy is no array of numbers."),
        (["--observe", "code.npy"], "code.npy is no NumPy array"),
    ],
)
def test_what_is_no_observation_is_one_message(arguments: list[str], message: str) -> None:
    Path("text.npy").write_text("1 2 3")
    Path("empty.npy").touch()
    np.save("flat.npy", OBSERVED.ravel())
    np.save("nan.npy", np.where(OBSERVED == 3, np.nan, OBSERVED))
    np.save("words.npy", np.array(["a", "b"]))
    np.save("code.npy", np.array([object()]), allow_pickle=True)
    assert message in refusal(run("sample", "-e", "net.onnx", *arguments))
    assert not Path("samples").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-e", "net.onnx", "--observe", "last=obs.npy"], "'last=obs.npy' is not NAME=FILE with"),
        (["-e", "unet.onnx", "--observe", "obs.npy"], "this network takes no observations"),
    ],
)
def test_an_input_that_there_is_not_is_wrong_usage(arguments: list[str], message: str) -> None:
    outcome = run("sample", *arguments)
    assert outcome.code == 2
    assert message in " ".join(outcome.err.replace("│", " ").split())


def test_verify_and_bench_take_numbers_of_their_own_where_none_are_given() -> None:
    outcome = run("verify", "--engine", "net.onnx", "--against", "net.onnx")
    assert outcome.code == 0, outcome.err
    assert "standard normal numbers stand for obs" in outcome.err
    outcome = run("bench", "--engine", "net.onnx", "--steps", 2, "--repeat", 1, "--warm-up", 1)
    assert outcome.code == 0, outcome.err
