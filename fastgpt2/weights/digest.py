"""The sha256 of a model's weights, in whatever files they are."""

import hashlib
from functools import lru_cache
from pathlib import Path

from fastgpt2 import runs
from fastgpt2.files import naming

# names of weight files in the formats that the package reads
_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.data-*", f"{runs.SHARDS}/*.safetensors")


def weights_sha256(path: Path) -> str:
    """The sha256 of a file, or of a folder's weight files sorted by name.

    Args:
        path: the file or folder.
    """
    files = [path]
    if path.is_dir():
        found = {file for pattern in _WEIGHT_FILES for file in path.glob(pattern)}
        files = sorted(file for file in found if file.name != runs.OPTIMIZER)
    stats = [file.stat() for file in files]
    return _sha256(
        tuple(
            (file.resolve(), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
            for file, stat in zip(files, stats, strict=True)
        )
    )


# adapters are opened more than once per process: do not read a file again that looks unchanged
@lru_cache(maxsize=64)
def _sha256(files: tuple[tuple[Path, int, int, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for file, *_ in files:
        with naming(file), file.open("rb") as stream:
            while chunk := stream.read(2**20):
                digest.update(chunk)
    return digest.hexdigest()
