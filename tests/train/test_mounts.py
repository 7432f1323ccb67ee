"""``--overwrite`` where the run folder is a mount point, or holds one: nothing of others is lost.

The mounts are made in a process with a mount namespace of its own, so no other process sees them.
"""

import ctypes
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from fastgpt2 import runs
from fastgpt2.convert import main as convert
from fastgpt2.prepare import main as prepare
from fastgpt2.train.__main__ import main as train
from fastgpt2.weights import save
from tests.commands.tiny_command import TEXT, TINY
from tests.weights.conftest import TINY as SHAPE
from tests.weights.conftest import random_checkpoint

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="namespaces are Linux's")

NEW_MOUNTS, NEW_USER = 0x00020000, 0x10000000
BIND, RECURSIVE, PRIVATE = 4096, 16384, 1 << 18
# exit code of a process that cannot mount
SKIP = 77


def libc(name: str, *arguments: object) -> None:
    """Call a function of the C library.

    Raises:
        OSError: it fails.
    """
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments):
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def mount(source: str, target: Path, kind: str, flags: int = 0) -> None:
    names = [os.fsencode(name) for name in (source, target, kind)]
    libc("mount", *names, ctypes.c_ulong(flags), None)


def own_mounts() -> None:
    """Give this process mounts of its own; one that is not root's needs its own users, too."""
    user, group = os.geteuid(), os.getegid()
    libc("unshare", NEW_MOUNTS | (NEW_USER if user else 0))
    if user:
        for file, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{user} {user} 1"),
            ("gid_map", f"{group} {group} 1"),
        ):
            Path("/proc/self", file).write_text(text, encoding="ascii")
    mount("none", Path("/"), "none", RECURSIVE | PRIVATE)


def alone(body: Callable[[], None]) -> None:
    """Call ``body`` in a process that may mount, and whose mounts end with it."""
    child = os.fork()
    if not child:
        code = 1
        try:
            try:
                own_mounts()
            except OSError:
                code = SKIP
                os._exit(code)
            body()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == SKIP:
        pytest.skip("this machine lets no process mount")
    assert code == 0


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


@pytest.fixture
def places(tmp_path: Path) -> list[Path]:
    """Empty folders: for a disk, for the second name of a folder, and that folder."""
    folders = [tmp_path / name for name in ("disk", "bound", "elsewhere")]
    for folder in folders:
        folder.mkdir()
    return folders


def mount_both(places: list[Path]) -> None:
    disk, bound, elsewhere = places
    mount("none", disk, "tmpfs")
    mount(str(elsewhere), bound, "none", BIND)


def begin(text: str, run: Path, *flags: str) -> int:
    return train(["--data", text, "--out", str(run), *TINY, "--steps=1", *flags])


@pytest.mark.usefixtures("no_picture")
def test_a_run_folder_that_is_a_mount_point(text: str, places: list[Path]) -> None:
    disk, bound, elsewhere = places

    def body() -> None:
        mount_both(places)
        for run in (disk, bound):
            assert begin(text, run) == 0
            (run / "left.txt").touch()
            # it cannot be deleted, but emptied
            assert begin(text, run, "--overwrite") == 0
            assert not (run / "left.txt").exists()
            assert runs.saved_steps(run) == [1]
        assert os.path.ismount(disk) and runs.saved_steps(elsewhere) == [1]

    alone(body)
    assert not list(disk.iterdir()) and runs.saved_steps(elsewhere) == [1]


@pytest.mark.usefixtures("no_picture")
def test_a_mount_point_in_a_run_folder_is_not_emptied(
    text: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, others = tmp_path / "run", tmp_path / "others"
    others.mkdir()
    (others / "precious.txt").write_text("mine", encoding="utf-8")
    assert begin(text, run) == 0
    (run / "data" / "inner").mkdir(parents=True)
    before = sorted(path.name for path in run.rglob("*"))
    capfd.readouterr()

    def body() -> None:
        mount(str(others), run / "data" / "inner", "none", BIND)
        assert begin(text, run, "--overwrite") == 2

    alone(body)
    assert (others / "precious.txt").read_text(encoding="utf-8") == "mine"
    assert sorted(path.name for path in run.rglob("*")) == before
    said = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    assert said == [
        f"fastgpt2 train: error: --overwrite: something is mounted on {run / 'data' / 'inner'}, "
        "which would be emptied"
    ]


def test_new_folders_may_be_mount_points(text: str, places: list[Path], tmp_path: Path) -> None:
    model = save(random_checkpoint(SHAPE), tmp_path / "model", "openai")
    disk, bound, elsewhere = places

    def body() -> None:
        mount_both(places)
        flags = ["--tokenizer=bytes", "--workers=1"]
        assert prepare(["--data", text, "--out", str(disk), *flags]) == 0
        assert (disk / "manifest.json").exists()
        assert convert([str(model), str(bound), "--to", "hf"]) == 0

    alone(body)
    assert (elsewhere / "config.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("bound", "disk", "elsewhere", "model", "text.txt")
    ]
