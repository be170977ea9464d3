from __future__ import annotations

from pathlib import Path

import pytest

from ddpm_deploy.engines.runtime_cache import RuntimeCache

KEY = {"plan": "abc", "version": "1.7.1.116", "device": "RTX 4090", "driver": "13.0"}


def test_what_was_compiled_comes_back(tmp_path: Path) -> None:
    RuntimeCache(tmp_path / "unet.plan", KEY).write(b"kernels\nand more")
    assert (tmp_path / "unet.plan.cache").is_file()
    assert RuntimeCache(tmp_path / "unet.plan", KEY).read() == b"kernels\nand more"


@pytest.mark.parametrize("changed", list(KEY))
def test_a_cache_for_something_else_is_left_aside(tmp_path: Path, changed: str) -> None:
    RuntimeCache(tmp_path / "unet.plan", KEY).write(b"kernels")
    assert RuntimeCache(tmp_path / "unet.plan", KEY | {changed: "other"}).read() is None


@pytest.mark.parametrize("content", [b"", b"{}", b"[]\n", b"\xff\xfe\n", b"kernels" * 999])
def test_a_damaged_cache_is_left_aside(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "unet.plan.cache").write_bytes(content)
    assert RuntimeCache(tmp_path / "unet.plan", KEY).read() is None


def test_a_cache_with_another_byte_or_a_byte_less_is_left_aside(tmp_path: Path) -> None:
    cache = RuntimeCache(tmp_path / "unet.plan", KEY)
    cache.write(b"kernels")
    content = cache.path.read_bytes()
    for damaged in (content[:-1], content[:-1] + b"S"):
        cache.path.write_bytes(damaged)
        assert cache.read() is None


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "unet.plan.cache").mkdir()
    cache = RuntimeCache(tmp_path / "unet.plan", KEY)
    cache.write(b"kernels")
    assert cache.read() is None


def test_a_cache_that_did_not_change_is_not_written_again(tmp_path: Path) -> None:
    cache = RuntimeCache(tmp_path / "unet.plan", KEY)
    cache.write(b"kernels")
    cache.path.unlink()
    cache.write(b"kernels")
    assert not cache.path.exists()
    cache.write(b"more kernels")
    assert cache.read() == b"more kernels"
