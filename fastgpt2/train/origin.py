"""The weights that a run begins with: ``--init-from``, in any format that the package reads."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fastgpt2 import distributed
from fastgpt2.errors import UserError
from fastgpt2.lora import add_lora
from fastgpt2.model import GPT
from fastgpt2.opener import OpenedModel, open_model
from fastgpt2.text import IdTokenizer, Tokenizer, get_tokenizer
from fastgpt2.train.config import TrainConfig
from fastgpt2.weights.digest import weights_sha256


@dataclass(frozen=True)
class Origin:
    """Weights whose description has been read, but not yet their tensors.

    Attributes:
        config: the run's, with the weights' shape, their absolute path and their sha256.
        opened: the weights.
    """

    config: TrainConfig
    opened: OpenedModel

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the weights were trained with."""
        return self.opened.tokenizer

    def load(self) -> GPT:
        """The model in fp32 on the CPU, its context cropped to the run's, with its adapters."""
        shape = replace(
            self.opened.config,
            vocab_size=self.tokenizer.vocab_size,
            **{
                name: getattr(self.config, name)
                for name in ("dropout", "attn_dropout", "embd_dropout", "resid_dropout")
            },
            impl=self.config.impl,
            fp32_residual=self.config.fp32_residual,
            fp8=self.config.fp8,
        )
        # skip an initialisation that would be overwritten at once
        with torch.device("meta"):
            model = GPT(shape)
        model.load_state_dict(self.opened.checkpoint.state_dict(), assign=True)
        if self.config.block_size is not None and self.config.block_size < shape.block_size:
            model.crop_block_size(self.config.block_size)
        model = model.to(torch.float32)
        config = self.config
        if config.lora_rank is not None:
            add_lora(
                model,
                rank=config.lora_rank,
                alpha=config.lora_alpha,
                targets=config.lora_targets,
                dropout=config.lora_dropout,
                base=self._base(),
                base_sha256=config.init_sha256,
            )
        return model

    def _base(self) -> str:
        """What adapters note as their base: a release by its name, else the path of the weights."""
        source, path = str(self.config.init_from), self.opened.path
        return str(path.resolve()) if Path(source).exists() else source


def open_origin(config: TrainConfig) -> Origin:
    """Open the weights that ``config.init_from`` names, and copy their shape to the run.

    Args:
        config: the run's; its tokenizer serves weights that come without one.

    Raises:
        UserError: no such model, the run wants another shape or tokenizer than it has, or another
            process of the job has found other weights.
    """
    assert config.init_from is not None
    given: Tokenizer | None = None
    if config.vocab_size is not None:
        given = IdTokenizer(config.vocab_size)
    elif config.tokenizer in ("gpt2", "bytes"):
        given = get_tokenizer(config.tokenizer, vocab_dir=config.vocab_dir)
    opened = open_model(config.init_from, tokenizer=given)
    if config.tokenizer not in ("auto", opened.tokenizer.name):
        raise UserError(
            f"--tokenizer {config.tokenizer}: the weights of {config.init_from} come with the "
            f"tokenizer {opened.tokenizer.name}"
        )
    if config.vocab_size not in (None, opened.tokenizer.vocab_size):
        raise UserError(
            f"--vocab-size {config.vocab_size}: the weights of {config.init_from} come with the "
            f"tokenizer {opened.tokenizer.name} ({opened.tokenizer.vocab_size} ids)"
        )
    shape = opened.config
    for name in ("n_layer", "n_head", "n_embd", "bias"):
        asked, has = getattr(config, name), getattr(shape, name)
        if asked not in (None, has):
            raise UserError(
                f"--init-from: the weights have {name} = {has}, the run asks for {asked}"
            )
    block_size = shape.block_size if config.block_size is None else config.block_size
    if block_size > shape.block_size:
        raise UserError(
            f"--init-from: the weights have {shape.block_size} positions, "
            f"block_size asks for {block_size}"
        )
    resolved = replace(
        config,
        tokenizer=opened.tokenizer.name,
        # the sizes below replace all of the preset's
        model="gpt2",
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        n_embd=shape.n_embd,
        block_size=block_size,
        bias=shape.bias,
        init_from=noted_source(config.init_from),
        init_sha256=weights_sha256(opened.checkpoint),
    )
    distributed.check_same("--init-from", f"weights {resolved.init_sha256}")
    return Origin(resolved, opened)


def noted_source(weights: str) -> str:
    """How a run notes where its weights came from: a path in full, a release by its name.

    Args:
        weights: the value of ``--init-from``.
    """
    return str(Path(weights).resolve()) if Path(weights).exists() else weights
