"""Memory of the C library: whether freed blocks go back to the system."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Makes the C library keep freed memory for its next allocation. Returns whether it can: only glibc can.

    By default glibc returns each large block to the system. Then the activations of every step are in new memory, which
    the system clears and maps page by page. This took a tenth to a third of a training step on the CPUs measured.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    return bool(library.mallopt(M_MMAP_MAX, 0) and library.mallopt(M_TRIM_THRESHOLD, -1))
