from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ddpm_deploy.files import sha256, whole_file, write_text

WRITER = """
import sys, time
from pathlib import Path
from ddpm_deploy.files import whole_file
try:
    with whole_file(Path(sys.argv[1])) as partial:
        partial.write_bytes(b"half of it")
        print("half", flush=True)
        time.sleep(60)
except KeyboardInterrupt:
    sys.exit(130)
"""

LIMITED = """
import resource, sys
from pathlib import Path
import numpy as np
from ddpm_deploy.images import write_png
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
pixels = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
try:
    write_png(Path(sys.argv[1]), pixels)
except OSError as error:
    print(error.strerror)
"""


def stop_in_the_middle(path: Path, how: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        process.send_signal(how)
        process.wait(timeout=30)
        assert process.returncode == (130 if how == signal.SIGINT else -how)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_file_appears_whole_in_a_folder_that_is_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "result.txt"
    with whole_file(path) as partial:
        partial.write_text("all of it")
        assert not path.exists()
        assert partial.parent == path.parent  # a rename is atomic within one file system only
        assert partial.suffix == ".txt"
        assert partial.name.startswith(".")
    assert path.read_text() == "all of it"
    assert names(path.parent) == ["result.txt"]


def test_an_old_file_stands_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "result.txt"
    path.write_text("old")
    with whole_file(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, OSError])
def test_an_error_in_the_middle_leaves_what_was_there(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "result.txt"
    path.write_text("old")

    def fail() -> None:
        with whole_file(path) as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["result.txt"]
    with pytest.raises(error), whole_file(tmp_path / "other.txt"):
        raise error  # before anything was written
    assert names(tmp_path) == ["result.txt"]


def test_ctrl_c_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "result.txt").write_text("old")
    stop_in_the_middle(tmp_path / "result.txt", signal.SIGINT)
    assert (tmp_path / "result.txt").read_text() == "old"
    assert names(tmp_path) == ["result.txt"]


def test_a_kill_leaves_what_was_there_and_no_file_of_the_name_sought(tmp_path: Path) -> None:
    (tmp_path / "result.txt").write_text("old")
    stop_in_the_middle(tmp_path / "result.txt", signal.SIGKILL)
    assert (tmp_path / "result.txt").read_text() == "old"
    stop_in_the_middle(tmp_path / "other.txt", signal.SIGKILL)
    assert not (tmp_path / "other.txt").exists()
    for left in names(tmp_path):
        assert left == "result.txt" or (left.startswith(".") and ".part" in left)
    # The next run is not in the way of what the killed one left.
    write_text(tmp_path / "result.txt", "new")
    assert (tmp_path / "result.txt").read_text() == "new"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on a file's size")
def test_a_disk_that_takes_no_more_leaves_nothing(tmp_path: Path) -> None:
    """The kernel refuses bytes after the first 10,000, as a full disk does."""
    path = tmp_path / "large.png"
    result = subprocess.run(
        [sys.executable, "-c", LIMITED, str(path)], capture_output=True, text=True, check=True
    )
    assert result.stdout == "File too large\n"
    assert names(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_writer_that_hits_a_full_device_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "result.txt"
    path.write_text("old")

    def fill() -> None:
        with whole_file(path) as partial, Path("/dev/full").open("w") as full:
            partial.write_text("half")
            full.write("the rest")

    with pytest.raises(OSError, match="No space left on device"):
        fill()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["result.txt"]


def test_a_path_below_a_file_or_of_a_folder_is_refused(tmp_path: Path) -> None:
    """Holds for root too, who may write into any folder."""
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match="file"):
        write_text(tmp_path / "file" / "result.txt", "new")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        write_text(tmp_path / "folder", "new")
    assert names(tmp_path) == ["file", "folder"]
    assert names(tmp_path / "folder") == []


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere"
)
def test_a_folder_without_leave_to_write_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    with pytest.raises(PermissionError):
        write_text(folder / "result.txt", "new")


def test_two_writers_of_one_name_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "result.txt"
    with whole_file(path) as first:
        first.write_text("first")
        with whole_file(path) as second:
            assert second != first
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    assert names(tmp_path) == ["result.txt"]


def test_text_is_utf_8_and_the_hash_is_that_of_the_bytes(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "β̃ = 0\n")
    assert (tmp_path / "a.txt").read_bytes() == "β̃ = 0\n".encode()
    large = tmp_path / "large"
    large.write_bytes(bytes(range(256)) * 10_000)  # over one block of reading
    for path in (tmp_path / "a.txt", large):
        assert sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_bytes_are_flushed_before_the_name_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "result.txt"
    order: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def flushing(descriptor: int) -> None:
        order.append("flush")
        assert not path.exists()
        fsync(descriptor)

    def renaming(self: Path, target: Path) -> Path:
        order.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", flushing)
    monkeypatch.setattr(Path, "replace", renaming)
    write_text(path, "new")
    assert order[:2] == ["flush", "rename"]
