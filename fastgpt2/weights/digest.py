"""The sha256 of a model's weights, in whatever files they are."""

import hashlib
from pathlib import Path

from fastgpt2 import runs

# what a folder's weights are called in the formats that the package reads
_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.data-*")


def weights_sha256(path: Path) -> str:
    """The sha256 of a file, or of a folder's files of weights in the order of their names.

    Args:
        path: what holds the weights.
    """
    files = [path]
    if path.is_dir():
        found = {file for pattern in _WEIGHT_FILES for file in path.glob(pattern)}
        files = sorted(file for file in found if file.name != runs.OPTIMIZER)
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(2**20):
                digest.update(chunk)
    return digest.hexdigest()
