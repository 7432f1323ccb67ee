"""Rung 1: a text becomes words and marks, each with a number."""

import re
from collections.abc import Iterable, Mapping

from fastgpt2.errors import UserError

END_OF_TEXT, UNKNOWN = "<|endoftext|>", "<|unk|>"

_MARK = r"""--|[,.:;?_!"()']"""
# a mark, or the longest run of characters in which no mark and no white space begins
_WORD = re.compile(rf"{_MARK}|(?:(?!{_MARK})\S)+")
_SPACE_BEFORE_MARK = re.compile(r"""\s+([,.:;?!"()'])""")


def split_words(text: str) -> list[str]:
    """Words and punctuation marks of ``text`` in order; white space is dropped.

    >>> split_words("Tea, or--coffee?")
    ['Tea', ',', 'or', '--', 'coffee', '?']
    """
    return _WORD.findall(text)


def build_vocab(text: str, special: Iterable[str] = ()) -> dict[str, int]:
    """Every distinct word of ``text`` in alphabetical order, then the special tokens, to its id."""
    words = [*sorted(set(split_words(text))), *special]
    return {word: id_ for id_, word in enumerate(words)}


class SimpleTokenizerV1:
    """Words to ids and back; it knows the words of its vocabulary and no others.

    Args:
        vocab: word to id, as ``build_vocab`` makes it.
    """

    def __init__(self, vocab: Mapping[str, int]) -> None:
        self.str_to_int = dict(vocab)
        self.int_to_str = {id_: word for word, id_ in vocab.items()}

    def encode(self, text: str) -> list[int]:
        """Ids of the words of ``text``.

        Raises:
            UserError: a word is not in the vocabulary.
        """
        return [self._id(word) for word in split_words(text)]

    def _id(self, word: str) -> int:
        if word not in self.str_to_int:
            raise UserError(f"{type(self).__name__}: {word!r} is not in the vocabulary")
        return self.str_to_int[word]

    def decode(self, ids: Iterable[int]) -> str:
        """The words of ``ids``, one space between them and none before a mark.

        How the words were spaced in the text is lost: encoding threw it away.
        """
        return _SPACE_BEFORE_MARK.sub(r"\1", " ".join(self.int_to_str[int(id_)] for id_ in ids))


class SimpleTokenizerV2(SimpleTokenizerV1):
    """The same for any text: an unknown word becomes ``<|unk|>``, which loses it.

    Raises:
        UserError: the vocabulary has no ``<|unk|>``.
    """

    def __init__(self, vocab: Mapping[str, int]) -> None:
        super().__init__(vocab)
        if UNKNOWN not in vocab:
            raise UserError(
                f"SimpleTokenizerV2: the vocabulary has no {UNKNOWN}; "
                f"build_vocab(text, special=({END_OF_TEXT!r}, {UNKNOWN!r})) adds it"
            )

    def _id(self, word: str) -> int:
        return self.str_to_int.get(word, self.str_to_int[UNKNOWN])
