from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from ddpm_deploy import open_engine
from ddpm_deploy.export import to_onnx
from ddpm_deploy.files import sha256
from tests.commands import Outcome, contents, finish, refusal, run, start
from tests.support import tiny_network, write_checkpoint, write_state_dict


@pytest.fixture
def traced(exported: Path) -> Path:
    """The graph of the checkpoint that is in the folder."""
    return exported / "unet.onnx"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a checkpoint in it, in which every command runs."""
    monkeypatch.chdir(tmp_path)
    write_checkpoint(Path("ckpt.pt"), classes=3)
    return tmp_path


@pytest.fixture
def quick(traced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives the traced graph to every export."""
    monkeypatch.setattr(to_onnx, "trace_network", lambda *_, **__: onnx.load_model(traced))


def export(*arguments: object) -> Outcome:
    return run("export", *arguments)


def test_the_file_is_named_and_says_where_it_came_from(traced: Path) -> None:
    spec = open_engine(traced).spec
    assert spec.checkpoint_sha256 == sha256(traced.with_name("ckpt.pt"))
    assert sorted(path.name for path in traced.parent.iterdir()) == ["ckpt.pt", "unet.onnx"]
    engine, reference = open_engine(traced), open_engine(traced.with_name("ckpt.pt"))
    x = np.random.default_rng(0).standard_normal((3, 1, 8, 8), dtype=np.float32)
    t = np.array([0, 7, 19])
    y = np.array([0, 2, 3])
    wanted = reference(x, t, y=y)
    assert np.abs(engine(x, t, y=y) - wanted).max() <= 2e-5 * np.abs(wanted).max()


@pytest.mark.usefixtures("quick")
def test_stdout_is_the_path_and_stderr_the_account() -> None:
    outcome = export("ckpt.pt")
    assert (outcome.code, outcome.out) == (0, "unet.onnx\n")
    first, *table, loop, last = outcome.err.splitlines()
    assert first == "ckpt.pt: test, ema weights, 1x8x8"
    assert [line.split()[0] for line in table[:4]] == ["what", "weights", "channels", "classes"]
    assert not any("ASSUMED" in line for line in table)  # a checkpoint of ours says all
    assert loop.startswith("its own loop, which sample runs: ddpm, 20 of 20 timesteps, variance ")
    assert " nodes, opset 20, " in last
    assert last.endswith(" of the peak from PyTorch over 5 batches")


@pytest.mark.usefixtures("quick")
def test_json_has_the_measurements() -> None:
    report = json.loads(export("ckpt.pt", "-o", "net.onnx", "--json").out)
    assert (report["path"], report["opset"], report["weights"]) == ("net.onnx", 20, "ema")
    assert report["bytes"] == Path("net.onnx").stat().st_size
    assert report["parameters"] == sum(p.numel() for p in tiny_network(classes=3).parameters())
    assert 0 <= report["largest_deviation"] <= 2e-5
    assert {fact["source"] for fact in report["facts"]} == {"weights", "config"}
    assert report["spec"]["sample_shape"] == [1, 8, 8]
    assert report["seconds"] > 0


@pytest.mark.usefixtures("quick")
def test_what_was_assumed_is_said() -> None:
    torch.save(tiny_network(classes=3).state_dict(), "bare.pt")
    outcome = export("bare.pt", "--image-size", 8, "--schedule", "cosine", "--timesteps", 50)
    assert outcome.code == 0, outcome.err
    lines = {line.split("  ")[0]: line.split() for line in outcome.err.splitlines()}
    assert lines["prediction"] == ["prediction", "epsilon", "ASSUMED", "--prediction"]
    assert lines["heads"] == ["heads", "4", "ASSUMED", "--set", "WHAT=..."]
    assert lines["image size"][2:4] == ["8x8", "flag"]
    assert lines["channels"] == ["channels", "1", "weights"]
    spec = open_engine("unet.onnx").spec
    assert (spec.schedule.name, spec.schedule.T, spec.sampler) == ("cosine", 50, "dome272")


class Command:
    """An object whose pickle runs a command when it is read."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch ran",)


def write_wrong_files() -> None:
    content = bytearray(Path("ckpt.pt").read_bytes())
    Path("short.pt").write_bytes(content[: len(content) // 2])
    content[len(content) // 2] ^= 1  # in the middle of a tensor
    Path("flipped.pt").write_bytes(content)
    Path("empty.pt").write_bytes(b"")
    Path("text.pt").write_text("epoch 1\n")
    Path("folder.pt").mkdir()
    Path("raw.pt").write_bytes(pickle.dumps({"model": Command()}))
    torch.save({"model": Command()}, "code.pt")
    optimizer = torch.optim.AdamW(tiny_network().parameters())
    torch.save(optimizer.state_dict(), "optim.pt")
    torch.save(torch.nn.Linear(2, 2).state_dict(), "linear.pt")
    state = tiny_network().state_dict()
    state["outc.bias"][0] = float("nan")
    torch.save(state, "nan.pt")
    write_state_dict(Path("bare.pt"))
    Path("file").write_text("a file")
    Path("taken.onnx").mkdir()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.pt"], "missing.pt does not exist; a checkpoint is a file."),
        (["folder.pt"], "folder.pt is a folder; a checkpoint is a file."),
        (["empty.pt"], "empty.pt is damaged, or is no checkpoint: it is empty."),
        (["text.pt"], "text.pt is damaged, or is no checkpoint: it is neither an archive nor a"),
        (["short.pt"], "short.pt is damaged, or is no checkpoint: it begins as an archive whose"),
        (["flipped.pt"], "flipped.pt is damaged, or is no checkpoint: the checksum of its record"),
        (["optim.pt"], "optim.pt is an optimizer's state, not a network."),
        (["linear.pt"], "The nearest family is dome272, with 0 of its 7 marks; missing: inc.doub"),
        (["code.pt"], "code.pt is a pickle that runs code when it is read: it asks for posix.sys"),
        (["raw.pt"], "raw.pt is a pickle that runs code when it is read: it asks for posix.system"),
        (["nan.pt"], "nan.pt has numbers that are not finite: 1 of 1 in outc.bias."),
        (["ckpt.pt", "--weights", "online"], "ckpt.pt holds no online weights; it has ema."),
        (["ckpt.pt", "--image-size", "16"], "ckpt.pt was trained at 8x8, not at --image-size 16."),
        (["ckpt.pt", "--schedule", "cosine"], "ckpt.pt was trained with the schedule linear"),
        (["ckpt.pt", "--schedule", "square"], "No schedule is called 'square'; there are linear"),
        (["ckpt.pt", "--opset", "12"], "Opset is 12; this exporter writes 18 to 23."),
        (["bare.pt", "--image-size", "20"], "The image size is 20x20; this network takes multiple"),
        (["bare.pt", "--timesteps", "1"], "The schedule has 1 timestep; networks of dome272"),
        (["ckpt.pt", "-o", "file/unet.onnx"], "A file stands where a folder is needed: file."),
        (["ckpt.pt", "-o", "file/a/unet.onnx"], "Not a directory: file/a"),
        (["ckpt.pt", "-o", "taken.onnx"], "Is a directory: taken.onnx."),
        (["ckpt.pt", "-o", "/proc/a/unet.onnx"], "/proc/a"),
        (
            ["ckpt.pt", "-o", "/dev/full/unet.onnx"],
            "A file stands where a folder is needed: /dev/f",
        ),
    ],
)
def test_what_cannot_be_is_one_message_and_leaves_nothing(
    folder: Path, arguments: list[str], message: str
) -> None:
    write_wrong_files()
    before = contents(folder)
    assert message in refusal(export(*arguments))
    assert contents(folder) == before  # the file that a pickle's code would make is not there


def test_an_optimizer_s_file_names_the_weights_beside_it() -> None:
    write_wrong_files()
    assert "ddpm-deploy export ckpt.pt" in export("optim.pt").err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["ckpt.pt", "-o", "unet.plan"],
        ["ckpt.pt", "-o", "models"],
        ["ckpt.pt", "--weights", "best"],
        ["ckpt.pt", "--image-size", "0"],
        ["ckpt.pt", "--timesteps", "0"],
        ["ckpt.pt", "--opset", "x"],
    ],
)
def test_wrong_usage_exits_with_2_and_leaves_nothing(folder: Path, arguments: list[str]) -> None:
    before = contents(folder)
    outcome = export(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("Usage: ")
    assert contents(folder) == before


@pytest.mark.parametrize("older", [True, False])
@pytest.mark.usefixtures("quick")
def test_a_graph_that_is_not_the_network_never_gets_its_name(folder: Path, older: bool) -> None:
    write_checkpoint(Path("other.pt"), classes=3, seed=1)  # its weights are not the traced graph's
    if older:
        assert export("ckpt.pt", "-o", "new/unet.onnx").code == 0
    before = contents(folder)
    message = refusal(export("other.pt", "-o", "new/unet.onnx"))
    assert message.startswith("The exported graph is not the trained network: at batch 1, t = [0]")
    assert message.endswith("Nothing was written.")
    assert contents(folder) == before


SLOW = """
import sys, time
import onnx
from ddpm_deploy.export import to_onnx
from ddpm_deploy.cli.app import main

def check(path, *_):  # the file is written, and has not got its name
    print(path.name, flush=True)
    time.sleep(60)

to_onnx.trace_network = lambda *_, **__: onnx.load_model({traced!r})
to_onnx.check_graph = check
main()
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_export_that_is_stopped_leaves_the_older_file_alone(
    folder: Path, traced: Path, how: signal.Signals
) -> None:
    Path("unet.onnx").write_bytes(b"the older one")
    before = contents(folder)
    process = start("export", "ckpt.pt", python=["-c", SLOW.format(traced=str(traced))])
    assert process.stdout is not None
    partial = process.stdout.readline().strip()
    assert Path(partial).stat().st_size > 0, partial
    process.send_signal(how)
    outcome = finish(process)
    if how == signal.SIGINT:
        assert outcome.code == 130
        assert outcome.err.splitlines()[-1] == ("interrupted; nothing half-written is left behind")
        assert "Traceback" not in outcome.err
    else:
        assert outcome.code == -signal.SIGKILL
        assert partial.startswith(".")
        Path(partial).unlink()  # a kill leaves no time to; the name is hidden and never read
    assert contents(folder) == before


LIMITED = """
import resource
import onnx
from ddpm_deploy.export import to_onnx
from ddpm_deploy.cli.app import main

to_onnx.trace_network = lambda *_, **__: onnx.load_model({traced!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
main()
"""


def test_a_disk_that_fills_up_leaves_nothing(folder: Path, traced: Path) -> None:
    before = contents(folder)
    code = LIMITED.format(traced=str(traced))
    outcome = finish(start("export", "ckpt.pt", "-o", "new/unet.onnx", python=["-c", code]))
    assert refusal(outcome) == "File too large."
    assert contents(folder) == before


@pytest.mark.usefixtures("quick")
def test_a_small_tmpfs_that_is_full_leaves_nothing(tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)],
        check=False,
        capture_output=True,
    )
    if mounted.returncode:
        pytest.skip("this user may not mount a small file system")
    try:
        outcome = export("ckpt.pt", "-o", place / "unet.onnx")
        assert refusal(outcome) == "No space left on device."
        assert "free some space" in outcome.err
        assert contents(place) == {}
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_package_that_is_not_installed_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("ddpm_deploy.export")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnx", None)
    outcome = export("ckpt.pt")
    assert "onnx is not installed" in refusal(outcome)
    assert " hint: pip install 'ddpm-deploy[export]'" in outcome.err
