"""Compute capabilities: which GPUs a flavour of TensorRT runs on."""

from __future__ import annotations

RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
"""Those in NVIDIA's support matrices of TensorRT-RTX."""


def rtx_runs_on(capability: str) -> bool:
    """Tells whether TensorRT-RTX runs its plans on GPUs of a compute capability.

    It does on those that NVIDIA lists and on later ones. Release 1.7.1 builds on a GPU of 9.0, and
    refuses to load what it built: "Supported compute capabilities: 8.0 8.6 8.9 12.0 12.1 >12.0".

    Args:
        capability: Such as `8.6`.
    """
    major, minor = (int(part) for part in capability.split("."))
    return capability in RTX_CAPABILITIES or (major, minor) > (12, 1)
