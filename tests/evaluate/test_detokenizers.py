import pytest

from fastgpt2.evaluate.detokenizers import DETOKENIZERS


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("none", " a , b \n", " a , b \n"),
        # the beginning of WikiText-2's test set is of this kind
        ("wikitext", " = Robert = \n Robert is an actor .", " = Robert =\nRobert is an actor."),
        ("wikitext", " = = Career = = \n", " == Career ==\n"),
        (
            "wikitext",
            "in the mid @-@ 1990s , 1 @,@ 250 and 3 @.@ 5 %",
            "in the mid-1990s, 1,250 and 3.5%",
        ),
        ("wikitext", 'he said " it is so " ( in 1999 ) .', 'he said "it is so" (in 1999).'),
        ("wikitext", "Tom 's , the boys ' and didn 't", "Tom's, the boys' and didn 't"),
        ("wikitext", "it did n't ; they 've <unk> $ 5", "it didn't; they've <unk> $5"),
        ("lambada", "`` you do n't , '' she said .", '"you don\'t," she said.'),
        ("lambada", "“so” it’s", '"so" it\'s'),
    ],
)
def test_rules(name: str, text: str, expected: str) -> None:
    assert DETOKENIZERS[name].detokenize(text) == expected


def test_wikitext_counts_the_ends_of_lines() -> None:
    # 241,211 words and 4,358 lines are the 245,569 tokens of WikiText-103's test set
    assert DETOKENIZERS["wikitext"].count(" = A = \n a b . \n") == 8
    assert DETOKENIZERS["none"].count(" = A = \n a b . \n") == 6
