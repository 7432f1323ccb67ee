"""Text out of a model, token by token."""

import codecs
from collections.abc import Iterator
from contextlib import nullcontext

import torch

from fastgpt2.errors import UserError
from fastgpt2.model import GPT
from fastgpt2.sampling import next_token
from fastgpt2.text import Tokenizer


@torch.no_grad()
def stream_tokens(
    model: GPT,
    prompt: list[int],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int | None = None,
    stop: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Iterator[int]:
    """Yield sampled token ids as they come, until ``max_new_tokens`` or the id ``stop``.

    The same seed gives the same tokens on the same machine. The model is used in eval mode.
    """
    device = model.lm_head.weight.device
    generator = torch.Generator(device)
    generator.manual_seed(generator.seed() if seed is None else seed)
    idx = torch.tensor([prompt], dtype=torch.int64, device=device)
    model.eval()
    cache = None
    low = dtype != torch.float32
    for i in range(max_new_tokens):
        with torch.autocast(device.type, dtype=dtype) if low else nullcontext():
            logits, cache = model.next_logits(idx, cache, max_new_tokens - i)
        token = next_token(logits, temperature=temperature, top_k=top_k, generator=generator)
        idx = torch.cat([idx, token], dim=1)
        id_ = int(token)
        if id_ == stop:
            return
        yield id_


def stream_text(
    model: GPT, tokenizer: Tokenizer, prompt: str, max_new_tokens: int, **sampling: object
) -> Iterator[str]:
    """The text of ``stream_tokens``, in pieces that never split a character.

    Raises:
        UserError: the prompt holds what the tokenizer cannot encode, or nothing can start a text.
    """
    ids = tokenizer.encode(prompt)
    if not ids:
        if tokenizer.eot is None:
            raise UserError("generate: an empty prompt needs a tokenizer with an end-of-text token")
        ids = [tokenizer.eot]
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    tokens = stream_tokens(model, ids, max_new_tokens, stop=tokenizer.eot, **sampling)  # type: ignore[arg-type]
    for id_ in tokens:
        if piece := decoder.decode(tokenizer.decode_bytes([id_])):
            yield piece
    if rest := decoder.decode(b"", final=True):
        yield rest
