"""The host's memory allocator, set for steps that take the same large buffers again and again."""

import ctypes
import sys

# of mallopt(3)
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let the process keep what it frees for its next allocation; False where it cannot.

    glibc hands large buffers back to the system, which clears every page of them when it gives them
    out again: in each step of a training on a CPU, all gradients, logits and activations. Kept,
    they are there at once; the process then holds on to its peak of memory.
    """
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    # no buffer of its own mapping, and no giving back of the heap's end
    return bool(libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, -1))
