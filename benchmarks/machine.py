"""Where and with what a measurement was made."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
from pathlib import Path

import torch


def processor(device: torch.device) -> str:
    """The name of the GPU, or of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def describe(device: torch.device) -> dict[str, str]:
    """Machine, versions, threads and date; the load average is that of the moment."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": processor(device),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "load average": load(),
        "system": f"{platform.system()} {platform.release()}",
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "hfopt": _version("hfopt"),
        "curvlinops": _version("curvlinops-for-pytorch"),
    }


def load() -> str:
    """The load averages of the last 1, 5 and 15 minutes."""
    try:
        return " ".join(f"{x:.2f}" for x in os.getloadavg())
    except OSError:
        return "unknown"


def folder_name(about: dict[str, str]) -> str:
    """``<processor>-<date>``, fit for a path."""
    name = re.sub(r"\W+", "-", about["processor"].lower()).strip("-") or "machine"
    return f"{name}-{about['date'][:10]}"
