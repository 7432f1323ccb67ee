"""The host's memory that this process may still take, as Linux tells it."""

import re
from collections.abc import Iterator
from pathlib import Path

PROC, GROUPS = Path("/proc"), Path("/sys/fs/cgroup")
# of both versions of control groups: their root, the limit, the use, and the part of it that the
# system gives up where memory is short, the pages of files that nobody has read lately
_V2 = ("", "memory.max", "memory.current", "inactive_file")
_V1 = ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
# of the address space: threads that a run starts, each with a stack of 8 MB and a heap of 64
THREADS = 6 * 72 * 2**20


def free_on_host(processes: int) -> int | None:
    """Bytes that this process may still take; None where the system does not tell.

    The least of its share in what is free on the machine and in each control group around it, as of
    a container or a job of Slurm, and of what ``ulimit -v`` and ``ulimit -d`` leave to it alone.

    Args:
        processes: how many share the machine and the groups.
    """
    found = re.search(r"^MemAvailable:\s*(\d+) kB", _text(PROC / "meminfo"), re.MULTILINE)
    if found is None:
        return None
    shared = min([1024 * int(found[1]), *_free_in_groups()])
    return max(0, min([shared // processes, *_free_by_limits()]))


def _free_in_groups() -> Iterator[int]:
    """What each control group with a limit, from this process's own outwards, has left."""
    for line in _text(PROC / "self" / "cgroup").splitlines():
        number, controllers, name = line.split(":", 2)
        if number != "0" and "memory" not in controllers.split(","):
            continue
        root, limit, use, idle = _V2 if number == "0" else _V1
        own = Path(name.lstrip("/"))
        # in a container, the group's name may be the one outside: only the root is there
        for group in (GROUPS / root / part for part in (own, *own.parents)):
            most, used = _text(group / limit).strip(), _text(group / use).strip()
            if most.isdigit() and used.isdigit():
                spare = re.search(rf"^{idle} (\d+)$", _text(group / "memory.stat"), re.MULTILINE)
                yield int(most) - int(used) + (int(spare[1]) if spare else 0)


def _free_by_limits() -> Iterator[int]:
    """What the limits of this process leave of its address space and of its own pages."""
    # this module does not exist on Windows
    import resource

    page, sizes = resource.getpagesize(), _text(PROC / "self" / "statm").split()
    for limit, place, kept in ((resource.RLIMIT_AS, 0, THREADS), (resource.RLIMIT_DATA, 5, 0)):
        most = resource.getrlimit(limit)[0]
        if most != resource.RLIM_INFINITY and len(sizes) > place:
            yield most - page * int(sizes[place]) - kept


def _text(path: Path) -> str:
    """What a file of the system says; nothing where it is not there."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
