"""Tokens per second of the loaders, and of ``prepare`` on real text.

The loaders return batches of B blocks of T tokens: the training stream over an array and over token
shards on disk, the book's sliding window through PyTorch's ``DataLoader``, and, as a rival,
nanoGPT's memory map. Their batches are checked against the corpus.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from benchmarks.harness import Lane, Race, Scale, Settings
from benchmarks.timing import Ceilings, Work
from fastgpt2.errors import UserError
from fastgpt2.prepare import prepare
from fastgpt2.text import load_corpus
from fastgpt2.text.loaders import Batch, BlockLoader, create_dataloader
from fastgpt2.text.prepared import open_prepared
from fastgpt2.text.shards import TokenShards, create_shard
from fastgpt2.text.tokenizers import get_tokenizer

TOKENIZER = get_tokenizer("bytes")


class LoaderRace(Race):
    """Batches of the same corpus from each loader."""

    contenders = ("blocks", "shards", "sliding window", "memory map, as nanoGPT")

    def __init__(self, tokens: int, B: int, T: int, batches: int) -> None:
        self.tokens, self.B, self.T, self.batches = tokens, B, T, batches
        self.group = f"loader B{B} T{T}"
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def _corpus(self) -> tuple[NDArray[np.uint16], Path]:
        """Random ids, and a folder with them as a shard and as plain numbers."""
        ids = np.random.default_rng(0).integers(256, size=self.tokens, dtype=np.uint16)
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory()
            folder = Path(self._folder.name)
            with create_shard(folder / "tokens.bin", TOKENIZER) as shard:
                shard.write(ids)
            ids.tofile(folder / "plain.bin")
        return ids, Path(self._folder.name)

    def _memory_mapped(self, path: Path) -> Iterator[Batch]:
        while True:
            # nanoGPT opens the file for each batch, to avoid a memory leak
            data = np.memmap(path, np.uint16, "r")
            starts = torch.randint(len(data) - self.T, (self.B,)).tolist()
            rows = [torch.from_numpy(data[i : i + self.T + 1].astype(np.int64)) for i in starts]
            yield torch.stack([r[:-1] for r in rows]), torch.stack([r[1:] for r in rows])

    def _loader(self, name: str, ids: NDArray[Any], folder: Path) -> Iterator[Batch]:
        B, T = self.B, self.T
        match name:
            case "blocks":
                return iter(
                    BlockLoader(ids, block_size=T, batch_size=B, vocab_size=TOKENIZER.vocab_size)
                )
            case "shards":
                shards = TokenShards([folder / "tokens.bin"])
                return iter(
                    BlockLoader(shards, block_size=T, batch_size=B, vocab_size=TOKENIZER.vocab_size)
                )
            case "sliding window":
                windows = create_dataloader(ids, B, T, T)
                return (batch for _ in iter(int, 1) for batch in windows)
        return self._memory_mapped(folder / "plain.bin")

    def prepare(self, name: str, settings: Settings) -> Work:
        """Draw batches; the first must be from the corpus, with the next tokens as targets."""
        ids, folder = self._corpus()
        loader = self._loader(name, ids, folder)
        idx, targets = next(loader)
        assert idx.shape == targets.shape == (self.B, self.T), f"{name}: shape {tuple(idx.shape)}"
        text = ids.astype(np.uint8).tobytes()
        for row, moved in zip(idx, targets, strict=True):
            assert torch.equal(row[1:], moved[:-1]), f"{name}: targets are not the next tokens"
            piece = row.numpy().astype(np.uint8).tobytes() + bytes([int(moved[-1])])
            assert piece in text, f"{name}: a block that is not in the corpus"

        def work() -> None:
            for _ in range(self.batches):
                next(loader)

        return work

    def facts(self, name: str, seconds: float, ceilings: Ceilings) -> dict[str, Any]:
        """Tokens per second."""
        tokens = self.B * self.T * self.batches
        return {"tokens": tokens, "tokens_per_s": tokens / seconds, "B": self.B, "T": self.T}

    def is_ours(self, name: str) -> bool:
        """All except nanoGPT's memory map."""
        return "nanoGPT" not in name

    def close(self) -> None:
        """Delete the files."""
        if self._folder is not None:
            self._folder.cleanup()


class PrepareRace(Race):
    """``prepare`` on repeated copies of Python's help texts, with one process or more."""

    def __init__(self, cores: int, dry: bool) -> None:
        # some installations of Python have few help texts
        self.repeats = 1 if dry else 30
        self.group = f"prepare python-docs x{self.repeats}"
        tokenizers = ("bytes",) if dry else ("gpt2", "bytes")
        workers = dict.fromkeys((1, 1 if dry else cores))
        self.contenders = tuple(f"{name} {n} processes" for name in tokenizers for n in workers)
        self._tokens: dict[str, int] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._text = ""

    def _corpus(self) -> Path:
        """The whole text in one file."""
        if self._folder is None:
            self._text = "".join(load_corpus("python-docs").pieces()) * self.repeats
            self._folder = tempfile.TemporaryDirectory()
            Path(self._folder.name, "corpus.txt").write_text(self._text, encoding="utf-8")
        return Path(self._folder.name, "corpus.txt")

    def prepare(self, name: str, settings: Settings) -> Work:
        """One whole run; its tokens must decode to the text."""
        tokenizer, workers = name.split()[0], int(name.split()[1])
        try:
            chosen = get_tokenizer(tokenizer)
        except UserError as error:
            # GPT-2's vocabulary may be missing without a network
            pytest.skip(f"{tokenizer}: {error}")
        data = [str(self._corpus())]

        def run(folder: Path) -> Path:
            prepare(data, folder, tokenizer=tokenizer, workers=workers, val_fraction=0.0)
            return folder

        def work() -> None:
            with tempfile.TemporaryDirectory() as folder:
                run(Path(folder, "shards"))

        with tempfile.TemporaryDirectory() as folder:
            tokens = open_prepared(run(Path(folder, "shards"))).tokens["train"]
            self._tokens[name] = len(tokens)
            start = chosen.decode(tokens[:1000].tolist())
            assert start[:500] == self._text[:500], f"{name}: the shards do not decode to the text"
            tokens.close()
        return work

    def facts(self, name: str, seconds: float, ceilings: Ceilings) -> dict[str, Any]:
        """Tokens and bytes of text per second."""
        tokens, size = self._tokens[name], len(self._text.encode("utf-8"))
        return {
            "tokens": tokens,
            "tokens_per_s": tokens / seconds,
            "bytes": size,
            "MB_per_s": size / seconds / 1e6,
        }

    def is_ours(self, name: str) -> bool:
        """Always true: no rival writes these shards."""
        return True

    def close(self) -> None:
        """Delete the corpus."""
        if self._folder is not None:
            self._folder.cleanup()


def races(settings: Settings) -> list[Race]:
    """The loaders, and ``prepare``."""
    dry = settings.scale is Scale.DRY
    loaders = LoaderRace(5_000, 2, 64, 2) if dry else LoaderRace(20_000_000, 16, 1024, 50)
    return [loaders, PrepareRace(torch.get_num_threads(), dry)]


def test_data(lane: Lane, record: Callable[[Lane], None]) -> None:
    """One loader, or one way to prepare."""
    record(lane)
