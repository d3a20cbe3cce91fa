"""Where downloaded and converted files are kept between runs."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def directory() -> Path:
    """`$FUSED_OPS_CACHE`, or `.cache` at the root of the repository."""
    return Path(os.environ.get("FUSED_OPS_CACHE") or Path(__file__).parents[1] / ".cache")


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """The directory `name` of the cache, filled by `make(directory)` the first time.

    It appears under its name whole or not at all: it is filled under another name, then renamed. Of several processes
    one fills it, and the others wait.
    """
    root, target = directory(), directory() / name
    if target.exists():
        return target
    root.mkdir(parents=True, exist_ok=True)
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed, or the process ends
        if target.exists():
            return target
        fresh = Path(tempfile.mkdtemp(prefix=f"{name}.", dir=root))
        try:
            make(fresh)
            fresh.chmod(0o755)  # mkdtemp's is private
            fresh.rename(target)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return target
