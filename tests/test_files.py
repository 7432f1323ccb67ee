import os
import re
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from fastgpt2.errors import UserError
from fastgpt2.files import atomic_folder, atomic_path, write_text


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
