"""How much of a file is in memory already, which decides how best to read it.

From memory, several threads with small steps are fastest. From the disk they are slowest: there one
thread asks for large pieces, around the page cache (O_DIRECT) where that may be: the blocks go to
host memory anyway. To try with `RWF_NOWAIT` is no way to find out: it starts reading ahead, a
little at a time, and was measured to be the slowest of all.
"""

import ctypes
import sys

_CACHESTAT = 451
"""Number of the system call on all architectures; Linux 6.5 and later have it."""

_PAGE_BYTES = 4096


class _Range(ctypes.Structure):
    _fields_ = (("start", ctypes.c_uint64), ("num_bytes", ctypes.c_uint64))


class _Pages(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in ("in_memory", "dirty", "written_back", "evicted", "recently_evicted")
    )


_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def share_in_memory(descriptor: int, start: int, num_bytes: int) -> float | None:
    """Which part of these bytes of a file is in memory; None where that is not told."""
    if _libc is None or not num_bytes:
        return None
    pages = _Pages()
    status = _libc.syscall(
        ctypes.c_long(_CACHESTAT),
        ctypes.c_uint(descriptor),
        ctypes.byref(_Range(start, num_bytes)),
        ctypes.byref(pages),
        ctypes.c_uint(0),
    )
    in_memory: int = pages.in_memory
    return None if status else in_memory * _PAGE_BYTES / num_bytes
