"""What a figure has to say about where it comes from."""

from __future__ import annotations

import datetime
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def describe(*packages: str) -> dict:
    """Machine, versions of torch and `packages`, date and commit, as JSON takes it."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "machine": {
            "cpu": _cpu(),
            "cores": torch.get_num_threads(),
            "instruction_set": torch.backends.cpu.get_cpu_capability(),
            "system": f"{platform.system()} {platform.machine()}",
            **_gpu(),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: _version(name) for name in packages},
        },
    }


def sentence(facts: dict) -> str:
    """The same in one line."""
    machine, versions = facts["machine"], facts["versions"]
    gpu = f"{machine['gpu']}, " if "gpu" in machine else ""
    programs = ", ".join(f"{name} {v}" for name, v in versions.items())
    return (
        f"{gpu}{machine['cpu']}, {machine['cores']} threads, {machine['instruction_set']}; {programs}; "
        f"{facts['date']}, commit {facts['commit']}"
    )


def _gpu() -> dict:
    if not torch.cuda.is_available():
        return {}
    device = torch.cuda.get_device_properties(0)
    return {
        "gpu": device.name,
        "capability": f"{device.major}.{device.minor}",
        "multiprocessors": device.multi_processor_count,
        "l2_bytes": device.L2_cache_size,
        "cuda": torch.version.cuda,
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """The commit checked out, marked where files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "none"
    return done.stdout.strip()
