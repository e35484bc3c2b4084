"""The memory that new tensors can take: the free memory, within the limits of this process."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch

UNLIMITED = 1 << 62
_CGROUPS = Path("/sys/fs/cgroup")
_PROC = Path("/proc")
# Of a control group: its limit, what it uses, and the entry of memory.stat for the cached files that it would let go.
_FILES = {
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def available_bytes(device: torch.device) -> int:
    """Memory that new tensors on ``device`` can take.

    On the CPU the least of: what the machine has (Linux: MemAvailable; elsewhere unlimited), what the control groups of
    a container or a batch job leave (cgroup v1 and v2), and what the limit of the address space leaves (``ulimit -v``).
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + cached)
    return max(0, min(_of_machine(_PROC), _of_groups(_PROC, _CGROUPS), _of_address_space(_PROC)))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def _entry(text: str, name: str) -> int | None:
    """The number after ``name`` in lines of names and numbers."""
    for line in text.splitlines():
        words = line.split()
        if len(words) > 1 and words[0].rstrip(":") == name and words[1].isdigit():
            return int(words[1])
    return None


def _of_machine(proc: Path) -> int:
    found = _entry(_text(proc / "meminfo"), "MemAvailable")
    return UNLIMITED if found is None else found * 1024


def _of_address_space(proc: Path) -> int:
    try:
        import resource
    except ImportError:  # Windows
        return UNLIMITED
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    used = _entry(_text(proc / "self" / "status"), "VmSize")
    return UNLIMITED if limit == resource.RLIM_INFINITY or used is None else limit - used * 1024


def _of_groups(proc: Path, root: Path) -> int:
    """Return the memory that the control groups of this process leave: the minimum over all levels."""
    left = UNLIMITED
    for version, folder in _limited(_text(proc / "self" / "cgroup"), root):
        limit_file, usage_file, cached = _FILES[version]
        limit, usage = _text(folder / limit_file).strip(), _text(folder / usage_file).strip()
        if limit.isdigit() and usage.isdigit():
            freed = _entry(_text(folder / "memory.stat"), cached) or 0
            left = min(left, int(limit) - max(0, int(usage) - freed))
    return left


@cache
def _limited(cgroup: str, root: Path) -> tuple[tuple[int, Path], ...]:
    """The groups that have a limit, looked for once: most levels have none, and every step asks for what is free."""
    limits = [(v, folder, _text(folder / _FILES[v][0]).strip()) for v, folder in _groups(cgroup, root)]
    return tuple((v, folder) for v, folder, limit in limits if limit.isdigit() and int(limit) < 1 << 60)  # "max": none


def _groups(cgroup: str, root: Path) -> Iterator[tuple[int, Path]]:
    """(version, folder) of this process's groups for memory, and of all above them.

    ``cgroup``: lines "number:controllers:/path"; version 2 has the number 0 and no controllers. Inside a container a
    path may be the host's and not be there: its own group is then the root.
    """
    for line in cgroup.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            version, bases = 2, [root, root / "unified"]
        elif "memory" in controllers.split(","):
            version, bases = 1, [root / "memory", root / controllers]
        else:
            continue
        parts = [p for p in path.split("/") if p not in ("", "..")]
        for base in bases:
            for depth in range(len(parts), -1, -1):
                yield version, base.joinpath(*parts[:depth])
