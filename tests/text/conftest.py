import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from fastgpt2.errors import UserError
from fastgpt2.text.bpe import GPT2Tokenizer
from tests.loopback import Site, serve
from tests.text.tiny import BESIDE_THE_REPOSITORY, tiny_files

# a loaded machine is slow, not wrong
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.fixture(scope="session")
def tiny_gpt2() -> GPT2Tokenizer:
    return GPT2Tokenizer(*tiny_files())


@pytest.fixture(scope="session")
def gpt2() -> Iterator[GPT2Tokenizer]:
    """The real vocabulary; no test is allowed to need it."""
    cache = BESIDE_THE_REPOSITORY / "tiktoken-cache"
    with pytest.MonkeyPatch.context() as patch:
        if "TIKTOKEN_CACHE_DIR" not in os.environ and cache.is_dir():
            patch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
        # tests stay off the network
        patch.setattr("fastgpt2.text.bpe.MIRRORS", {"encoder.json": (), "vocab.bpe": ()})
        try:
            yield GPT2Tokenizer.load()
        except UserError as error:
            pytest.skip(f"needs GPT-2's vocabulary: {error}")


@pytest.fixture
def site() -> Iterator[Site]:
    with serve() as running:
        yield running


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Empty caches, and mirrors that refuse the connection."""
    monkeypatch.setenv("FASTGPT2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "tiktoken"))
    dead = ("http://127.0.0.1:9/nobody",)
    monkeypatch.setattr("fastgpt2.text.bpe.MIRRORS", {"encoder.json": dead, "vocab.bpe": dead})
