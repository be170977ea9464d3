"""Which Jetson this is, from the files that its system carries."""

from __future__ import annotations

import re
from dataclasses import dataclass

# Jetson Linux (L4T) -> JetPack, as NVIDIA's JetPack archive and jetson_stats pair them.
JETPACK = {
    "35.1.0": "5.0.2",
    "35.2.1": "5.1",
    "35.3.1": "5.1.1",
    "35.4.1": "5.1.2",
    "35.5.0": "5.1.3",
    "35.6.0": "5.1.4",
    "35.6.1": "5.1.5",
    "35.6.2": "5.1.5",
    "36.2.0": "6.0 DP",
    "36.3.0": "6.0",
    "36.4.0": "6.1",
    "36.4.3": "6.2",
    "36.4.4": "6.2.1",
    "36.4.7": "6.2.1",
    "36.5.0": "6.2.2",
    "36.5.2": "6.2.3",
    "38.2.0": "7.0",
    "38.2.1": "7.0",
    "38.2.2": "7.0",
    "38.4.0": "7.1",
    "39.2.0": "7.2",
    "39.2.1": "7.2.1",
}
MAJOR = {32: "4", 34: "5", 35: "5", 36: "6", 38: "7", 39: "7"}
JETPACK_7_2_1 = (39, 2, 1)


@dataclass(frozen=True, kw_only=True)
class Jetson:
    """A Jetson.

    Attributes:
        model: The board, as its device tree names it; empty where it does not.
        l4t: The release of Jetson Linux: `36.4.3`.
    """

    model: str
    l4t: str

    @property
    def jetpack(self) -> str:
        """The release of JetPack, `6.2`; only its first number where the L4T is a later one."""
        return JETPACK.get(self.l4t) or MAJOR.get(self._numbers[0], "unknown")

    @property
    def takes_tensorrt_11(self) -> bool:
        """Whether TensorRT 11.4.1 supports it: AGX Orin or Thor, JetPack 7.2.2 or later.

        References:
            https://docs.nvidia.com/deeplearning/tensorrt/11.4.1/api/migration/tensorrt-10x-to-11x-jetson.html
        """
        small = "Orin" in self.model and "AGX" not in self.model
        return self._numbers > JETPACK_7_2_1 and not small

    @property
    def _numbers(self) -> tuple[int, ...]:
        return tuple(map(int, self.l4t.split(".")))


def read_jetson(release: str, model: str) -> Jetson | None:
    """Reads what a Jetson says of itself.

    Args:
        release: The text of /etc/nv_tegra_release, which begins
            `# R36 (release), REVISION: 4.3, ...`.
        model: The text of /proc/device-tree/model, which ends in a NUL.

    Returns:
        The board; None where `release` is not such a text.
    """
    found = re.search(r"R(\d+) \(release\), REVISION: (\d+)\.(\d+)", release)
    if found is None:
        return None
    return Jetson(model=model.strip("\0 \n"), l4t=".".join(found.groups()))
