"""How long this process has run."""

from __future__ import annotations

import os
import time
from pathlib import Path

_IMPORTED = time.monotonic()


def seconds_since_start(stat: Path = Path("/proc/self/stat")) -> float:
    """Returns the seconds since this process was started, to a hundredth.

    Where the system does not say when that was, as Linux does, it is since this file was imported.

    Args:
        stat: The file in which Linux says it, see proc_pid_stat(5).
    """
    try:
        # The second field, the program's name in brackets, may hold anything, brackets too.
        fields = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # the 22nd, counted from boot
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
    except (OSError, IndexError, ValueError, AttributeError):
        return time.monotonic() - _IMPORTED
