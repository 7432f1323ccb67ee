"""A model's own methods for generation, which ``fastgpt2.generate`` implements."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Generative(nn.Module):
    """``generate``, as on nanoGPT's class, and ``log_probs``."""

    def generate(
        self,
        idx: Tensor | Sequence[Sequence[int]],
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> Any:
        """Append sampled tokens to ``idx``: (B, T) -> (B, T + max_new_tokens), as nanoGPT does.

        Each row gets the text that it would get alone, for any lengths of the others.

        Args:
            idx: (B, T) token ids; or a list of lists of ids, which gives a list of lists.
            max_new_tokens: the most that follow each row.
            temperature: below 1 sharper, above 1 flatter; 0 is greedy.
            top_k: draw from the k most likely tokens only.
            generator: source of random numbers; None means PyTorch's default. The rows of a tensor
                share it, as in nanoGPT; those of a list have one each, seeded from it.
            options: by name:
                ``processors``, callables ``(ids, logits) -> logits`` (see ``fastgpt2.generate``);
                ``stop``, an id or several that end a row and are not part of it (a tensor's rows
                are filled up with the first of them);
                ``seed``, of every row's own random numbers, in place of ``generator``: the same
                seed gives a prompt the same text in any batch;
                ``attention_mask`` (B, T), 0 for padding at the left or at the right;
                ``window``, past block_size: ``crop`` (nanoGPT's way: every token sees the last
                block_size, recomputed), ``slide`` (go on with the last half) or ``stop``;
                ``num_beams``, ``length_penalty``, ``early_stopping``: beam search;
                ``best_of``, how many samples of each row to draw, of which the one with the highest
                log-probability per token is returned;
                ``draft``, a smaller model that proposes tokens, or ``prompt_lookup``, how many to
                propose from the text itself: the same greedy tokens, the same distribution;
                ``compile``, whether the decoding step is compiled (on a CPU; some seconds, and then
                kept on disk) or captured as a CUDA graph (on a GPU): a warning says so where it
                cannot be.

        Returns:
            A tensor for a tensor, with as many new columns as the longest row has new tokens; a
            list of lists for lists.

        Raises:
            UserError: an argument is out of its range, or a prompt is empty.
        """
        from fastgpt2.generate.batch import generate

        model: Any = self
        draws: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "generator": generator}
        return generate(model, idx, max_new_tokens, **draws, **options)

    def log_probs(self, ids: Tensor | Sequence[Sequence[int]], batch_size: int = 8) -> Any:
        """log p(token | the tokens before it) of every token but the first, in nats.

        Texts longer than block_size are read in windows that overlap by half. Log-softmax is in
        fp32; no gradient.

        Args:
            ids: (B, T) token ids, or a list of lists of ids.
            batch_size: windows in one pass of the model.

        Returns:
            (B, T - 1) fp32, or a list of lists of floats; a text's total is their sum.

        Raises:
            UserError: a text is empty, or an id is not in the vocabulary.
        """
        from fastgpt2.generate.batch import log_probs

        model: Any = self
        return log_probs(model, ids, batch_size)
