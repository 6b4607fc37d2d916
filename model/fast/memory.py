"""What this process does with memory that it frees."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Has the C library keep what this process frees, for its next allocation; returns whether it can (glibc only).

    By default glibc hands each large block back to the system. Every activation of every step is then new memory, which
    the system clears and maps page by page: a tenth to a third of a training step on the CPUs measured.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    return bool(library.mallopt(M_MMAP_MAX, 0) and library.mallopt(M_TRIM_THRESHOLD, -1))
