"""A network as an ONNX file that was checked before it appears."""

from __future__ import annotations

from ddpm_deploy.export.check import Deviation, check_graph
from ddpm_deploy.export.to_onnx import OPSETS, Exported, export_network

__all__ = ["OPSETS", "Deviation", "Exported", "check_graph", "export_network"]
