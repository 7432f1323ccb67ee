"""One prompt, streamed: text that never splits a character."""

from collections.abc import Iterator

from fastgpt2.generate.generator import Generator
from fastgpt2.generate.text import encode_prompt
from fastgpt2.model import GPT
from fastgpt2.text.encoding import Tokenizer

__all__ = ["encode_prompt", "stream_text"]


def stream_text(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int | None = None,
    window: str = "crop",
) -> Iterator[str]:
    """The text that follows, in pieces that never split a character.

    Args:
        model: the model; it runs in evaluation mode.
        tokenizer: the model's tokenizer; its end-of-text token ends the text.
        prompt: the text to continue.
        max_new_tokens: the most tokens that follow.
        temperature: below 1 sharper, above 1 flatter; 0 is greedy.
        top_k: draw from the k most likely tokens only.
        seed: equal seeds give the same text on the same machine; None means a new one.
        window: what happens when the text outgrows the context: see ``Generator``.

    Raises:
        UserError: an argument is out of its range, or the prompt cannot be encoded.
    """
    stream = Generator(model, tokenizer, batch_size=1, window=window).submit(
        prompt, max_new_tokens, temperature=temperature, top_k=top_k, seed=seed
    )
    for piece in stream:
        assert isinstance(piece, str)
        yield piece
