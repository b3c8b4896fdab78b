"""What the figures were measured on."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

from benchmarks.fast_path.processes import ROOT

_PACKAGES = ("jacserve", "jax", "jaxlib", "grpcio", "protobuf", "numpy")


def describe() -> dict[str, str]:
    """Returns hardware, versions and the commit, by name."""
    return {
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{_memory_bytes() / 2**30:.0f} GiB",
        "load average": f"{os.getloadavg()[0]:.1f} at the start",
        "system": platform.platform(),
        "Python": platform.python_version(),
        **{name: version(name) for name in _PACKAGES},
        "commit": _commit(),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _commit() -> str:
    try:
        git = ["git", "-C", str(ROOT)]
        commit = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"])
        changes = subprocess.check_output([*git, "status", "--porcelain"])
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.decode().strip() + (" with changes" if changes.strip() else "")
