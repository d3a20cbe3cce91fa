"""Fused operations in models as they are: `patch(model)`, `unpatch(model)`."""

from .patch import patch, unpatch
from .report import Entry, Report

__all__ = ["Entry", "Report", "patch", "unpatch"]
