import contextlib
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastgpt2.errors import UserError
from fastgpt2.files import atomic_folder, atomic_path, new_folders, write_text


def test_new_content_appears_only_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    write_text(path, "old ü\n")
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"new")
        assert path.read_bytes() == "old ü\n".encode()
        assert temporary.parent == path.parent
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["file"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), atomic_path(path) as temporary:
        temporary.write_bytes(b"half")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "file", "x")
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_bytes_are_on_the_disk_before_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def recorded(name: str) -> Callable[..., None]:
        real = getattr(os, name)

        def call(*args: object) -> None:
            done.append(name)
            real(*args)

        return call

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, recorded(name))
    write_text(tmp_path / "file", "x")
    # the content, the rename, and the folder's new entry
    assert done == ["fsync", "replace", "fsync"]


def test_folder_appears_only_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder"
    with atomic_folder(path) as temporary:
        (temporary / "file").write_bytes(b"x")
        assert not path.exists() and temporary.parent == path.parent
    assert (path / "file").read_bytes() == b"x"
    assert os.listdir(path.parent) == ["folder"]


def test_an_empty_folder_may_be_there_already(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "file").write_bytes(b"x")
    assert os.listdir(tmp_path / "folder") == ["file"]


def test_nothing_is_put_over_a_folder_or_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    for path in (tmp_path, tmp_path / "file"):
        message = f"{path}: exists already and is not empty"
        with pytest.raises(UserError, match=re.escape(message)), atomic_folder(path):
            raise AssertionError("must not be reached")
    assert os.listdir(tmp_path) == ["file"]


def test_an_error_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "file").write_bytes(b"x")
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.name == "nt", reason="links")
def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    (tmp_path / "place" / "file").write_bytes(b"old")
    (tmp_path / "file").symlink_to("place/file")
    write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").is_symlink()
    assert (tmp_path / "place" / "file").read_bytes() == b"new"
    (tmp_path / "link").symlink_to("folder")
    (tmp_path / "folder").mkdir()
    with atomic_folder(tmp_path / "link") as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "file").write_bytes(b"x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "folder" / "inner" / "file").read_bytes() == b"x"
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", "link", "place"]


def test_the_working_folder_may_be_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with atomic_folder(Path(".")) as temporary:
        (temporary / "a").write_bytes(b"a")
        (temporary / "b").mkdir()
    assert sorted(os.listdir(".")) == sorted(os.listdir(tmp_path)) == ["a", "b"]


@pytest.mark.parametrize("n", [1, 2])
def test_a_folder_that_is_filled_gets_all_or_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    rename, done = os.rename, []

    def failing(source: Path, target: Path) -> None:
        done.append(target)
        if len(done) == n:
            raise OSError(5, "Input/output error")
        rename(source, target)

    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="Input"), atomic_folder(tmp_path / "folder") as temporary:
        for name in "ab":
            (temporary / name).write_bytes(b"x")
    assert os.listdir(tmp_path / "folder") == []


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes as files")
def test_a_device_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe: is not a regular file"):
        write_text(tmp_path / "pipe", "x")
    assert (tmp_path / "pipe").is_fifo()


def test_new_folders_that_stay_empty_are_removed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for path in (tmp_path / "a" / "b", tmp_path / "mine" / "c"):
        with pytest.raises(ZeroDivisionError), new_folders(path):
            assert path.is_dir()
            raise ZeroDivisionError
        with pytest.raises(ZeroDivisionError), atomic_path(path / "file"):
            raise ZeroDivisionError
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"]
    with new_folders(tmp_path / "a" / "b" / "c"):
        (tmp_path / "a" / "file").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "file", "mine"]


def test_a_name_may_be_as_long_as_the_system_allows(tmp_path: Path) -> None:
    write_text(tmp_path / ("n" * 255), "x")
    with atomic_folder(tmp_path / ("é" * 120)) as temporary:
        (temporary / "file").touch()
    assert sorted(map(len, os.listdir(tmp_path))) == [120, 255]


def test_of_two_that_make_one_folder_the_second_is_refused(tmp_path: Path) -> None:
    """Both begin while there is nothing, or an empty folder."""
    for there in (False, True):
        path = tmp_path / str(there)
        if there:
            path.mkdir()
        message = f"{re.escape(str(path))}: exists already and is not"
        with pytest.raises(UserError, match=message), _begun(path) as second:
            with _begun(path) as first:
                (first / "file").write_bytes(b"first")
            (second / "file").write_bytes(b"second")
        assert (path / "file").read_bytes() == b"first"
        assert os.listdir(path) == ["file"]
    assert sorted(os.listdir(tmp_path)) == ["False", "True"]


@contextlib.contextmanager
def _begun(path: Path) -> Iterator[Path]:
    """As by a process that looks at the folder before another one has written anything."""
    with contextlib.ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "iterdir", lambda self: iter(()))
            folder = stack.enter_context(atomic_folder(path))
        yield folder


def test_what_makes_a_folder_complete_comes_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the clock says: it may have gone back, or not on, while the files were written."""
    rename, done = os.rename, []

    def watched(source: Path, target: Path) -> None:
        done.append(Path(target).name)
        rename(source, target)

    (tmp_path / "folder").mkdir()
    with atomic_folder(tmp_path / "folder", last=("manifest", "none")) as temporary:
        for number, name in enumerate(("manifest", "a", "b")):
            (temporary / name).touch()
            os.utime(temporary / name, (number, number))
        monkeypatch.setattr(os, "rename", watched)
    assert sorted(done[:2]) == ["a", "b"] and done[2:] == ["manifest"]


@pytest.mark.parametrize("links", [True, False])
def test_a_new_file_replaces_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "file"
    with atomic_path(path, new=True) as temporary:
        temporary.write_bytes(b"first")
    with pytest.raises(UserError, match="file: exists already"), atomic_path(path, new=True) as new:
        new.write_bytes(b"second")
    assert path.read_bytes() == b"first" and os.listdir(tmp_path) == ["file"]
