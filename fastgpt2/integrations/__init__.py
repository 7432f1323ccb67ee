"""GPT-2 of Hugging Face transformers on our kernels; importing it needs the extra ``hf``."""

from importlib.metadata import PackageNotFoundError, version

_OLDEST = (5, 17)


def _obstacle() -> str | None:
    """Why transformers cannot serve here, or None if it can."""
    try:
        found = version("transformers")
    except PackageNotFoundError:
        return "it is not installed"
    if tuple(int(part) for part in found.split(".")[:2]) < _OLDEST:
        return f"found {found}"
    return None


if (_reason := _obstacle()) is not None:
    raise ImportError(
        f"fastgpt2's drop-in needs transformers >= {'.'.join(map(str, _OLDEST))} ({_reason}): "
        "pip install 'fastgpt2[hf]'"
    )
