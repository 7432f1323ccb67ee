"""The sha256 of a model's weights, in whatever files they are."""

import hashlib
from functools import lru_cache
from pathlib import Path

from fastgpt2.files import naming
from fastgpt2.weights.checkpoint import Checkpoint


def weights_sha256(checkpoint: Checkpoint) -> str:
    """The sha256 of the files that the weights are read from, one after the other.

    Other files beside them do not count: a Trainer's optimizer, the same weights in another format.

    Args:
        checkpoint: what a reader returned.
    """
    stats = [file.stat() for file in checkpoint.files]
    return _sha256(
        tuple(
            (file.resolve(), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
            for file, stat in zip(checkpoint.files, stats, strict=True)
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
