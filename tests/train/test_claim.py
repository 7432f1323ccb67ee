"""A run folder has one owner, and is emptied only when nothing else is lost with it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastgpt2.errors import UserError
from fastgpt2.train.claim import check_outside, claimed, empty, is_empty, new_folder

CLAIM = """
import sys, time
from pathlib import Path
from fastgpt2.train.claim import claimed
with claimed(Path(sys.argv[1])):
    print("mine", flush=True)
    time.sleep(60)
"""


def test_another_process_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", CLAIM, str(run)], stdout=subprocess.PIPE, env=environment
    ) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"mine\n"
        with pytest.raises(UserError, match="another process is training into it"), claimed(run):
            pass
        owner.kill()
        owner.wait()
    # a killed process leaves its file, not its claim
    assert is_empty(run)
    with claimed(run):
        assert is_empty(run)
    assert run.is_dir()


def test_twice_in_one_process_and_what_is_left(tmp_path: Path) -> None:
    run = tmp_path / "a" / "run"
    with claimed(run):
        with pytest.raises(UserError, match="another process"), claimed(run):
            pass
        assert not is_empty(tmp_path)
    assert not run.exists()
    with claimed(run):
        (run / "file").touch()
    assert [path.name for path in run.iterdir()] == ["file"]


def test_new_folders_are_never_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = [new_folder("x") for _ in range(5)]
    # the first one has made the folder around them, too
    assert [len(folders) for folders in made] == [2, 1, 1, 1, 1]
    assert len({folders[0] for folders in made}) == 5
    assert all(folders[0].is_dir() for folders in made)


def test_what_was_made_for_a_run_that_does_not_begin_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folders = new_folder("x")
    with claimed(folders[0], made=folders):
        pass
    (tmp_path / "mine").mkdir()
    for run in (Path("a/b/run"), Path("mine/run")):
        with pytest.raises(ZeroDivisionError), claimed(run):
            raise ZeroDivisionError
    # a folder that somebody else has made stays, empty as it is
    assert os.listdir(tmp_path) == ["mine"]


def test_emptying_keeps_the_folder_and_follows_no_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside, run = tmp_path / "outside", tmp_path / "run"
    for folder in (outside, run / "checkpoints" / "step_00000001"):
        folder.mkdir(parents=True)
        (folder / "file").touch()
    (run / "config.toml").touch()
    (run / "link").symlink_to(outside)
    (tmp_path / "name").symlink_to(run)
    monkeypatch.chdir(run)
    inode = run.stat().st_ino
    # by a link's name, and from inside
    empty(tmp_path / "name")
    empty(Path("."))
    assert (run.stat().st_ino, list(run.iterdir())) == (inode, [])
    assert (outside / "file").exists()


def test_what_a_run_is_made_from_is_not_deleted(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "text.txt").touch()
    (tmp_path / "alias").symlink_to(run / "text.txt")
    for path in (run, run / "text.txt", tmp_path / "alias", run / "no" / "such"):
        with pytest.raises(UserError, match=r"--overwrite: data .* would be emptied"):
            check_outside(run, [path], "data")
    check_outside(run, [tmp_path, tmp_path / "run2"], "data")


def test_what_a_run_reaches_through_the_folder_is_not_deleted(tmp_path: Path) -> None:
    """The name of the data would lead nowhere after the links are gone."""
    run, outside = tmp_path / "run", tmp_path / "outside"
    for folder in (run, outside):
        folder.mkdir()
    (outside / "text.txt").touch()
    (run / "folder").symlink_to(outside)
    (run / "text.txt").symlink_to(outside / "text.txt")
    for path in (run / "folder", run / "folder" / "text.txt", run / "text.txt"):
        with pytest.raises(UserError, match="would be emptied"):
            check_outside(run, [path], "data")
    check_outside(run, [outside / "text.txt"], "data")
