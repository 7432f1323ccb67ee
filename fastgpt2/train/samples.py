"""What the model writes while it trains."""

import torch

from fastgpt2.devices import autocast
from fastgpt2.errors import UserError
from fastgpt2.generate.stream import stream_text
from fastgpt2.model import GPT
from fastgpt2.text import Tokenizer
from fastgpt2.train.config import TrainConfig


def sample(model: GPT, tokenizer: Tokenizer, config: TrainConfig, dtype: torch.dtype) -> str:
    """The run's prompt and the model's continuation; the model is in training mode afterwards.

    If there is none, because the logits are not finite, it is the reason: the run's guard decides
    what becomes of such weights.

    Args:
        model: the model, not sharded.
        tokenizer: the run's tokenizer.
        config: has the prompt and the length.
        dtype: dtype of the computation.
    """
    with autocast(model.lm_head.weight.device, dtype):
        # a seed of its own: showing a sample must not change the training that follows
        pieces = stream_text(
            model,
            tokenizer,
            config.sample_prompt,
            config.sample_tokens,
            temperature=0.8,
            top_k=50,
            seed=config.seed,
        )
        try:
            text = config.sample_prompt + "".join(pieces)
        except UserError as error:
            text = f"no sample: {error}"
    model.train()
    return text
