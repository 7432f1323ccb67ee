import pytest

from fastgpt2.ladder.__main__ import main

SMALL = ["--batch", "1", "--context", "16", "--width", "32", "--repeats", "1", "--device", "cpu"]


def test_the_table_has_a_row_for_each_attention(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(SMALL) == 0
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if "ttention" in line]
    assert [row[1].strip() for row in rows] == [
        "simple_attention",
        "SelfAttentionV1",
        "SelfAttentionV2",
        "CausalAttention",
        "MultiHeadAttentionWrapper",
        "MultiHeadAttention",
        "PackedMultiHeadAttention",
        "SDPAMultiHeadAttention",
        "KernelMultiHeadAttention",
    ]
    for row in rows:
        assert float(row[2]) > 0
        assert float(row[3]) > 0
    differences = [row[4].strip() for row in rows]
    assert [bool(text) for text in differences] == [False, False, True, False, False, *[True] * 4]
    assert all(float(text) < 1e-5 for text in differences if text)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--heads", "5"], "d_out must be a multiple of num_heads, got 32, 5"),
        (["--repeats", "0"], "--repeats: must be 1 or more, got 0"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], flags: list[str], message: str) -> None:
    assert main([*SMALL, *flags]) == 2
    assert message in capsys.readouterr().err
