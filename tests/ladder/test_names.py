import subprocess
import sys

import pytest

from fastgpt2 import ladder


@pytest.mark.parametrize("name", ladder.__all__)
def test_every_name_is_importable(name: str) -> None:
    assert getattr(ladder, name) is not None


def test_every_name_has_a_home_and_no_other_has() -> None:
    assert sorted(ladder.__all__) == sorted(ladder._HOME)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"'fastgpt2\.ladder' has no attribute 'Nope'"):
        ladder.Nope  # noqa: B018


def test_importing_the_ladder_imports_neither_torch_nor_tiktoken() -> None:
    code = "import sys, fastgpt2.ladder; print(sorted({'torch', 'tiktoken'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True
    )
    assert done.stdout.strip() == "[]"
