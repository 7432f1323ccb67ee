"""The one way to open a model: a release's name, a run, a checkpoint, or any known format."""

from dataclasses import dataclass
from pathlib import Path

import torch

from fastgpt2 import distributed, runs
from fastgpt2.config import GPT2_VOCAB, GPTConfig, padded
from fastgpt2.errors import UserError
from fastgpt2.model import GPT
from fastgpt2.text.bpe import GPT2Tokenizer
from fastgpt2.text.encoding import Tokenizer
from fastgpt2.weights import Checkpoint, load
from fastgpt2.weights.hub import locate


@dataclass(frozen=True)
class OpenedModel:
    """A model whose weights have not been read yet.

    Attributes:
        name: what the user calls it.
        path: the folder or file that holds it, the checkpoint of a run.
        checkpoint: its configuration and its tensors, read as they are asked for.
        tokenizer: the one beside it, or one that was given.
    """

    name: str
    path: Path
    checkpoint: Checkpoint
    tokenizer: Tokenizer

    @property
    def config(self) -> GPTConfig:
        """The shape of the model."""
        return self.checkpoint.config

    def load(self, device: torch.device, dtype: torch.dtype, impl: str = "auto") -> GPT:
        """The model on ``device`` in ``dtype``, in evaluation mode, without dropout.

        Args:
            device: where the weights go.
            dtype: of the weights and of the computation.
            impl: the implementation of the kernels.

        Raises:
            UserError: a file is damaged, or the run has deleted this checkpoint meanwhile.
        """
        try:
            model = GPT.from_pretrained(str(self.path), {"impl": impl})
        except UserError:
            if self.path.exists():
                raise
            raise UserError(
                f"{self.path}: the run has deleted this checkpoint meanwhile; start again"
            ) from None
        return model.to(device, dtype).eval()


def _newest_or_best(run: Path, checkpoint: str) -> Path:
    """The chosen checkpoint of a run, which may be training, and then deletes some."""
    while True:
        path = runs.best(run) if checkpoint == "best" else runs.latest(run)
        try:
            load(path)
            return path
        except UserError:
            if path.exists():
                raise


def open_model(
    name: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    override: bool = False,
    checkpoint: str = "best",
    offline: bool = False,
) -> OpenedModel:
    """Look at a model without reading its weights.

    Args:
        name: ``gpt2``, ``gpt2-medium``, ``gpt2-large``, ``gpt2-xl``; a run folder or one of its
            checkpoints; a folder or a file in any format that ``fastgpt2 convert`` reads.
        tokenizer: for a model that brings none.
        override: take ``tokenizer`` for a model that brings its own, too.
        checkpoint: of a run, ``best`` (lowest validation loss) or ``latest``.
        offline: do not use the network.

    Raises:
        UserError: there is no such model, it is damaged, it has no tokenizer, or one that does
            not fit.
    """
    found_at = path = locate(name, offline=offline)
    if (path / runs.CHECKPOINTS).is_dir():
        # a run that trains may get another one before the next process looks
        path = distributed.on_rank_0(lambda: _newest_or_best(found_at, checkpoint))
    opened = load(path, offline=offline)
    vocab_size = opened.config.vocab_size
    found = tokenizer
    if found is None or not override:
        found = runs.find_tokenizer(found_at) or tokenizer
    if found is None and vocab_size >= GPT2_VOCAB:
        # the files of nanoGPT and llm.c bring no vocabulary: it is OpenAI's
        found = GPT2Tokenizer.load()
    if found is None:
        raise UserError(f"{name}: no tokenizer beside it; give --tokenizer or --vocab-dir")
    if not found.vocab_size <= vocab_size <= padded(found.vocab_size):
        raise UserError(
            f"{name}: the tokenizer {found.name} has {found.vocab_size} ids, the model {vocab_size}"
        )
    return OpenedModel(str(name), path, opened, found)
