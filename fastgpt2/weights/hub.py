"""The four releases of GPT-2, fetched once into one cache folder.

Two sources, tried in turn: Hugging Face, if ``huggingface_hub`` is installed (it publishes a sha256
of every large file), and OpenAI (whose checkpoints carry a CRC of every tensor).
"""

import re
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from fastgpt2.config import GPTConfig
from fastgpt2.download import DownloadError, cache_dir, download
from fastgpt2.errors import UserError
from fastgpt2.weights.checkpoint import LazyStateDict
from fastgpt2.weights.formats import load

# Hugging Face's names, and OpenAI's, which are the number of parameters
RELEASES = {"gpt2": "124M", "gpt2-medium": "355M", "gpt2-large": "774M", "gpt2-xl": "1558M"}

# OpenAI's server (openai/gpt-2, download_model.py), then the copy that rasbt/LLMs-from-scratch
# falls back to
OPENAI_MIRRORS = (
    "https://openaipublic.blob.core.windows.net/gpt-2/models",
    "https://f001.backblazeb2.com/file/LLMs-from-scratch/gpt2",
)
# small files first: a wrong address fails at once
OPENAI_FILES = (
    "checkpoint",
    "hparams.json",
    "encoder.json",
    "vocab.bpe",
    "model.ckpt.index",
    "model.ckpt.data-00000-of-00001",
)
# None means the hub's own address, or HF_ENDPOINT
HUB_MIRRORS: tuple[str | None, ...] = (None,)
HUB_OWNER = "openai-community"
HUB_FILES = ("config.json", "vocab.json", "merges.txt", "model.safetensors")
SHA256 = re.compile(r"[0-9a-f]{64}")


def download_openai(name: str, folder: Path, timeout: float = 30.0) -> None:
    """Download OpenAI's files of a release into ``folder``; existing files are kept.

    Args:
        name: one of ``RELEASES``.
        folder: where the files go.
        timeout: seconds that a server may take to answer.

    Raises:
        DownloadError: a file could not be downloaded from any mirror.
    """
    for file in OPENAI_FILES:
        urls = [f"{mirror}/{RELEASES[name]}/{file}" for mirror in OPENAI_MIRRORS]
        download(urls, folder / file, timeout=timeout)


def _from_hub(name: str, folder: Path, timeout: float) -> None:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    for file in HUB_FILES:
        reasons = []
        for endpoint in HUB_MIRRORS:
            url = hf_hub_url(f"{HUB_OWNER}/{name}", file, endpoint=endpoint)
            try:
                facts = get_hf_file_metadata(url, timeout=timeout)
                # the tag of a large file is its sha256, of a small one git's sha1
                sha256 = facts.etag if facts.etag and SHA256.fullmatch(facts.etag) else None
                download(url, folder / file, sha256=sha256, size=facts.size, timeout=timeout)
                break
            except DownloadError as error:
                reasons.append(str(error))
            except Exception as error:
                # the library's HTTP client may raise anything: try the next mirror
                line = next(iter(str(error).splitlines()), "")
                reasons.append(f"{url}: {type(error).__name__}: {line}")
        else:
            raise DownloadError("; ".join(reasons))


SOURCES: dict[str, tuple[Callable[[str, Path, float], None], tuple[str, ...]]] = {
    "huggingface": (_from_hub, HUB_FILES),
    "openai": (download_openai, OPENAI_FILES),
}


def fetch(name: str, *, offline: bool = False, timeout: float = 30.0) -> Path:
    """The folder of a release, downloaded if it is not in the cache.

    Args:
        name: one of ``RELEASES``.
        offline: use only the cache.
        timeout: seconds that a server may take to answer.

    Raises:
        UserError: offline and not in the cache, or (DownloadError) no source has it.
    """
    folders = {source: cache_dir() / "models" / source / name for source in SOURCES}
    for source, (_, files) in SOURCES.items():
        if all((folders[source] / file).is_file() for file in files):
            return folders[source]
    if offline:
        raise UserError(
            f"{name} is not in the cache ({cache_dir() / 'models'}), and offline is set"
        )
    reasons = []
    for source, (get, _) in SOURCES.items():
        if source == "huggingface" and find_spec("huggingface_hub") is None:
            reasons.append("huggingface_hub is not installed")
            continue
        try:
            get(name, folders[source], timeout)
            return folders[source]
        except DownloadError as error:
            reasons.append(str(error))
    raise DownloadError(f"{name}: {'; '.join(reasons)}")


def locate(name_or_path: str | Path, *, offline: bool = False) -> Path:
    """The path itself if it exists, else the folder of the release of that name."""
    path = Path(name_or_path)
    if path.exists():
        return path
    name = str(name_or_path).removeprefix(f"{HUB_OWNER}/")
    if name not in RELEASES:
        raise UserError(
            f"{name_or_path}: no such file or folder, and not one of {', '.join(RELEASES)}"
        )
    return fetch(name, offline=offline)


def load_pretrained(
    name_or_path: str | Path, *, offline: bool = False
) -> tuple[GPTConfig, LazyStateDict]:
    """Configuration and weights of a release or of a model on the disk, in any known format.

    Args:
        name_or_path: ``gpt2``, ``gpt2-medium``, ``gpt2-large``, ``gpt2-xl``, a folder or a file.
        offline: do not use the network.

    Returns:
        The configuration, and the state dict by canonical names (the tied head once), whose
        tensors are read one by one when accessed. The releases get dropout 0; other models keep
        their recorded dropout.

    Raises:
        UserError: the model does not exist, could not be downloaded, or is damaged.
    """
    path = locate(name_or_path, offline=offline)
    checkpoint = load(path, offline=offline)
    config = checkpoint.config
    if not Path(name_or_path).exists():
        # Hugging Face's config.json has 0.1, OpenAI's none: do not depend on the source
        config = replace(
            config, dropout=0.0, attn_dropout=None, embd_dropout=None, resid_dropout=None
        )
    return config, checkpoint.state_dict()
