"""Fixtures of the tests of generation."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from fastgpt2.generate import library as library_module


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all tests keep the library: it is compiled once."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def libraries(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is read from the user's cache, or written there."""
    monkeypatch.setattr(library_module, "_folder", lambda: folder)
    yield
    library_module._loaded.cache_clear()
