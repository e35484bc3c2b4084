"""Keeping freed memory, so that large activations don't cost page faults at every product."""

from __future__ import annotations

import ctypes
import sys

# Names and numbers of glibc's mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Make the C library reuse large freed blocks instead of returning them to the kernel; False where it can't.

    glibc maps blocks beyond 32 MiB afresh every time, and the kernel then clears each page as it is first touched:
    on sequences whose activations are that large, page faults take a good part of a product. This is a setting of the
    whole process, which afterwards holds on to the most memory it ever used, so it is for programs to choose (the
    runs do) and not for the library.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
