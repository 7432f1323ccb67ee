"""Text out of a model, token by token."""

import codecs
from collections.abc import Iterator

import torch

from fastgpt2.errors import UserError
from fastgpt2.generate.sampling import next_token
from fastgpt2.model import GPT
from fastgpt2.text import Tokenizer


def encode_prompt(tokenizer: Tokenizer, prompt: str, name: str = "prompt") -> list[int]:
    """Ids of a prompt; an empty one starts a new text.

    Raises:
        UserError: the prompt, called ``name``, holds what the tokenizer cannot encode, or it is
            empty and the vocabulary has no end-of-text token.
    """
    try:
        ids = tokenizer.encode(prompt)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    if ids:
        return ids
    if tokenizer.eot is None:
        raise UserError(f"{name}: must not be empty, {tokenizer.name} has no end-of-text token")
    return [tokenizer.eot]


def check_prompt(tokenizer: Tokenizer, prompt: str, name: str = "prompt") -> None:
    """Raise now what ``encode_prompt`` would raise later.

    Args:
        tokenizer: of the model.
        prompt: any text.
        name: what the error calls the prompt.

    Raises:
        UserError: see ``encode_prompt``.
    """
    encode_prompt(tokenizer, prompt, name)


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
    for i in range(max_new_tokens):
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
        UserError: the prompt cannot be encoded (see ``encode_prompt``).
    """
    ids = encode_prompt(tokenizer, prompt)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    tokens = stream_tokens(model, ids, max_new_tokens, stop=tokenizer.eot, **sampling)  # type: ignore[arg-type]
    for id_ in tokens:
        if piece := decoder.decode(tokenizer.decode_bytes([id_])):
            yield piece
    if rest := decoder.decode(b"", final=True):
        yield rest
