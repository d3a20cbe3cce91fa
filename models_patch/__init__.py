"""Fused operations in models as they are: `patch(model)`, `unpatch(model)`; `shard(model, ..)` before, on ranks."""

from .patch import patch, unpatch
from .report import Entry, Report
from .tensor_parallel import shard

__all__ = ["Entry", "Report", "patch", "shard", "unpatch"]
