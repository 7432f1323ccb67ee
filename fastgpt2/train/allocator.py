"""The host's memory allocator, tuned for steps that allocate the same large buffers repeatedly."""

import ctypes
import sys

# options of mallopt(3)
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let the process keep freed memory for its next allocation; False where that is not possible.

    glibc returns large buffers to the system, which clears every page before it hands them out
    again: in each training step on a CPU, all gradients, logits and activations. Buffers that are
    kept are available at once, but the process then keeps its peak of memory.
    """
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    # never map a buffer separately, never return the end of the heap
    return bool(libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, -1))
