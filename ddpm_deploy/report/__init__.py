"""What `verify` found as one HTML page, which needs neither a network nor a server."""

from __future__ import annotations

from ddpm_deploy.report.page import html, write_report

__all__ = ["html", "write_report"]
