"""Names for the arrays that cross modules.

The shapes are in the names' docstrings; NumPy's types cannot carry them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.float32]
"""float32, (N, *sample_shape); images are (N, C, H, W) in [-1, 1]."""

Timesteps = NDArray[np.int64]
"""int64, (N,): indices into the training schedule, 0 (least noise) to T-1."""

Pixels = NDArray[np.uint8]
"""uint8, (N, H, W, C) or one picture (H, W, C), in 0..255."""

Coefficients = NDArray[np.float64]
"""float64, (T,): one number a timestep."""

Array = NDArray[Any]
"""Any array; conditions have the dtype and shape that the spec gives them."""
