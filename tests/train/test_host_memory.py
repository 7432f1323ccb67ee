"""What the system says of free memory, made up in files."""

import resource
from pathlib import Path

import pytest

from fastgpt2.train import host_memory
from fastgpt2.train.host_memory import free_on_host

MACHINE = 1000 * 1024


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 1,000 KiB of free memory, and no groups."""
    monkeypatch.setattr(host_memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(host_memory, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(resource, "getrlimit", lambda what: (resource.RLIM_INFINITY,) * 2)
    write(tmp_path / "proc/meminfo", "MemTotal: 9000 kB\nMemAvailable: 1000 kB\n")
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def group(system: Path, name: str, limit: str, used: int, idle: int = 0) -> None:
    folder = system / "groups" / name
    write(folder / "memory.max", f"{limit}\n")
    write(folder / "memory.current", f"{used}\n")
    write(folder / "memory.stat", f"anon 5\ninactive_file {idle}\n")


def test_processes_share_the_machine(system: Path) -> None:
    assert free_on_host(1) == MACHINE and free_on_host(4) == MACHINE // 4
    (system / "proc/meminfo").unlink()
    assert free_on_host(1) is None


def test_the_tightest_group_around_the_process(system: Path) -> None:
    """Slurm limits a job two levels above its processes."""
    write(system / "proc/self/cgroup", "0::/slurm/job_7/step_0\n")
    group(system, "slurm/job_7/step_0", "max", 300)
    assert free_on_host(1) == MACHINE
    group(system, "slurm/job_7", "10000", 4000)
    group(system, "slurm", "500000", 4000)
    assert free_on_host(1) == 6000 and free_on_host(2) == 3000
    # pages of files that nobody has read lately are given up first
    group(system, "slurm/job_7", "10000", 4000, idle=1000)
    assert free_on_host(1) == 7000
    group(system, "slurm/job_7", "10000", 12000)
    assert free_on_host(1) == 0


def test_a_container_that_sees_its_group_as_the_root(system: Path) -> None:
    write(system / "proc/self/cgroup", "4:memory:/docker/abc\n0::/docker/abc\n")
    group(system, "", "10000", 4000)
    assert free_on_host(1) == 6000


def test_the_first_version_of_groups(system: Path) -> None:
    write(system / "proc/self/cgroup", "9:cpu:/a\n4:memory:/a/b\n")
    for name, limit in (("a/b", 2**63 - 4096), ("a", 9000)):
        write(system / "groups/memory" / name / "memory.limit_in_bytes", f"{limit}\n")
        write(system / "groups/memory" / name / "memory.usage_in_bytes", "5000\n")
    write(system / "groups/memory/a/memory.stat", "inactive_file 1\ntotal_inactive_file 500\n")
    assert free_on_host(1) == 4500


@pytest.mark.parametrize(("what", "free"), [("RLIMIT_AS", 70), ("RLIMIT_DATA", 90)])
def test_the_limits_of_one_process(
    system: Path, monkeypatch: pytest.MonkeyPatch, what: str, free: int
) -> None:
    """They are not shared."""
    page, limited = resource.getpagesize(), getattr(resource, what)
    write(system / "proc/self/statm", "30 9 9 9 0 10 0\n")

    def getrlimit(asked: int) -> tuple[int, int]:
        # threads reserve addresses, which hold nothing yet
        kept = host_memory.THREADS if what == "RLIMIT_AS" else 0
        most = kept + 100 * page if asked == limited else resource.RLIM_INFINITY
        return most, resource.RLIM_INFINITY

    monkeypatch.setattr(resource, "getrlimit", getrlimit)
    assert free_on_host(2) == free * page
