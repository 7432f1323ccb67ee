"""Turn benchmarks that come split into words back into text like GPT-2's training data.

Radford et al., 2019, section 3.1, undo "tokenization artifacts" such as free-standing punctuation
before they score a text, and divide by the number of the benchmark's own tokens. Their programs
were not published; these rules are ours, so a figure made with them is not the paper's.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

Rules = tuple[tuple[str, str], ...]

_WIKITEXT: Rules = (
    # "1 @,@ 000", "mid @-@ 1990s"
    (r" @([-,.])@ ", r"\1"),
    # headings are "= Title =" to "= = = Title = = ="
    (r"= (?==)", "="),
    (r" ([,.;:?!%)\]])(?=\s|$)", r"\1"),
    (r"([(\[$£€]) ", r"\1"),
    (r" (n't|'(?:s|m|d|re|ve|ll))\b", r"\1"),
    # the possessive of a plural
    (r"(?<=s) '(?= )", "'"),
    # quotes in pairs, within a line
    (r'" ([^"\n]*?) "', r'"\1"'),
    (r" ?\n ?", "\n"),
)
_LAMBADA: Rules = (
    (r"``|''|[“”]", '"'),
    (r"[‘’]", "'"),
    (r" ([,.;:?!])(?=\s|$)", r"\1"),
    (r" (n't|'(?:s|m|d|re|ve|ll))\b", r"\1"),
    (r'" ([^"\n]*?) "', r'"\1"'),
)


def _apply(rules: Rules) -> Callable[[str], str]:
    def detokenize(text: str) -> str:
        for pattern, replacement in rules:
            text = re.sub(pattern, replacement, text)
        return text

    return detokenize


def count_words(text: str) -> int:
    """Words between white space."""
    return len(text.split())


def count_words_and_lines(text: str) -> int:
    """Words, and an end of line for each line: the tokens of WikiText (Merity et al., 2016)."""
    return len(text.split()) + text.count("\n")


@dataclass(frozen=True)
class Detokenizer:
    """How a text is detokenized, and how the words of the original text are counted.

    ``unit`` names what ``count`` counts.
    """

    detokenize: Callable[[str], str]
    count: Callable[[str], int]
    unit: str


DETOKENIZERS = {
    "none": Detokenizer(lambda text: text, count_words, "words"),
    "wikitext": Detokenizer(_apply(_WIKITEXT), count_words_and_lines, "words and line ends"),
    "lambada": Detokenizer(_apply(_LAMBADA), count_words, "words"),
}
