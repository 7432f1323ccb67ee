import shutil
from pathlib import Path

import pytest

from fastgpt2.train.__main__ import main as train
from tests.commands.tiny_command import TEXT, TINY
from tests.commands.tiny_generate import save_tiny


@pytest.fixture(scope="package")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


@pytest.fixture(scope="package")
def finished(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "finished"
    assert train(["--data", data, "--out", str(run), *TINY]) == 0
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A run folder to spoil."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture(autouse=True)
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgpt2.train.trainer.plot", lambda *_: False)


@pytest.fixture(scope="package")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an untrained model, for ``generate``."""
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")
