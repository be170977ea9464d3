"""How long does a start take? python benchmarks/start_up.py.

Times new processes, several of each in turn, and prints the median in milliseconds beside that of
Python alone.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

ROUNDS = 9
COMMANDS = {
    "python alone": ["-c", "pass"],
    "import numpy": ["-c", "import numpy"],
    "import ddpm_deploy": ["-c", "import ddpm_deploy"],
    "ddpm-deploy --help": ["-m", "ddpm_deploy", "--help"],
    "import onnxruntime": ["-c", "import onnxruntime"],
    "import torch": ["-c", "import torch"],
}


def main() -> None:
    """Prints a line for each command."""
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(ROUNDS):
        for name, arguments in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
            times[name].append(time.perf_counter() - start)
    for name, taken in times.items():
        print(f"{name:20} {1000 * statistics.median(taken):6.0f} ms")


if __name__ == "__main__":
    main()
