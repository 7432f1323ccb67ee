"""The reference builds from the docstrings, without a warning."""

from pathlib import Path

import pytest

pytest.importorskip("pdoc")

from tools.api import build


def test_the_pages_show_arguments_and_errors(tmp_path: Path) -> None:
    build(tmp_path, ("fastgpt2.text", "fastgpt2.ladder"))
    page = (tmp_path / "fastgpt2" / "text.html").read_text(encoding="utf-8")
    for part in ("load_corpus", "build_dataset", "Arguments:", "Raises:"):
        assert part in page
