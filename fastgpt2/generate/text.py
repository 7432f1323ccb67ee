"""Token ids to text, piece by piece: no character is split, and a stop string never shows."""

import codecs
from collections.abc import Sequence

from fastgpt2.errors import UserError
from fastgpt2.text import Tokenizer


def encode_prompt(tokenizer: Tokenizer, prompt: str, name: str = "prompt") -> list[int]:
    """Ids of a prompt; an empty one starts a new text.

    Args:
        tokenizer: the model's.
        prompt: the text.
        name: the prompt's name in an error message.

    Raises:
        UserError: the prompt holds what the tokenizer cannot encode, or it is empty and the
            vocabulary has no end-of-text token.
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


class TextPieces:
    """The text of a growing list of ids, up to the first stop string.

    Args:
        tokenizer: the model's.
        stop: strings that end the text; they are not part of it.

    Attributes:
        stopped: a stop string has come.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        # decoded text that may be the beginning of a stop string
        self._held = ""
        self.stopped = False

    def push(self, id_: int) -> str:
        """The text that can be shown after one more id; perhaps none yet."""
        return self._show(self._decoder.decode(self._tokenizer.decode_bytes([id_])))

    def finish(self) -> str:
        """The text that was held back, when no more ids follow."""
        if self.stopped:
            return ""
        # if the last bytes complete a stop string, nothing is held back
        shown = self._show(self._decoder.decode(b"", final=True))
        shown, self._held = shown + self._held, ""
        return shown

    def _show(self, piece: str) -> str:
        text = self._held + piece
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        cut = len(text) - held
        self._held = text[cut:]
        return text[:cut]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of ``text`` that is a prefix of ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
