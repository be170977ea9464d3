from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from ddpm_deploy.process import seconds_since_start

PROGRAM = """
import time
time.sleep(0.3)
from ddpm_deploy.process import seconds_since_start
print(seconds_since_start())
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="only Linux has this file")
def test_the_time_before_the_first_import_counts() -> None:
    start = time.monotonic()
    told = subprocess.run(
        [sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True
    ).stdout
    assert 0.29 < float(told) < time.monotonic() - start + 0.02  # the start is told in hundredths


@pytest.mark.parametrize("content", [None, "", "1 (python) S 2", "1 (py) S) " + "x " * 30])
def test_where_the_system_does_not_say_it_is_since_the_import(
    tmp_path: Path, content: str | None
) -> None:
    stat = tmp_path / "stat"
    if content is not None:
        stat.write_text(content)
    first = seconds_since_start(stat)
    assert 0 <= first <= seconds_since_start(stat) <= seconds_since_start() + 0.02


def test_a_name_with_brackets_and_spaces_is_no_part_of_the_fields(tmp_path: Path) -> None:
    fields = ["S", *["0"] * 18, "0", *["0"] * 30]  # started at boot
    stat = tmp_path / "stat"
    stat.write_text(f"1 (a ) b) {' '.join(fields)}\n")
    assert seconds_since_start(stat) > seconds_since_start()
