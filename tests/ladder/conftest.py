import pytest

from fastgpt2.ladder import GPT2Tokenizer
from tests.text.tiny import BESIDE_THE_REPOSITORY


@pytest.fixture
def verdict() -> str:
    """The story itself, where there is one: it is not part of the repository."""
    path = BESIDE_THE_REPOSITORY / "data" / "the-verdict.txt"
    if not path.is_file():
        pytest.skip(f"The Verdict is not at {path}")
    return path.read_text(encoding="utf-8")


@pytest.fixture
def gpt2_tokenizer(monkeypatch: pytest.MonkeyPatch) -> GPT2Tokenizer:
    """GPT-2's own vocabulary, where there is one."""
    cache = BESIDE_THE_REPOSITORY / "tiktoken-cache"
    if not cache.is_dir():
        pytest.skip(f"GPT-2's vocabulary is not at {cache}")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    return GPT2Tokenizer.load()
