"""Where downloaded and converted files are kept between runs."""

from __future__ import annotations

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

    It appears under its name whole or not at all: it is filled under another name, then renamed.
    """
    root, target = directory(), directory() / name
    if not target.exists():
        root.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f"{name}.", dir=root))
        try:
            make(fresh)
            fresh.chmod(0o755)  # mkdtemp's is private
            fresh.rename(target)
        except OSError:
            if not target.exists():  # otherwise another process was faster
                raise
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return target
