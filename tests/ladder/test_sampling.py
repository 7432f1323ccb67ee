import pytest
import torch

from fastgpt2.errors import UserError
from fastgpt2.ladder import generate, generate_text_simple, next_token_probabilities
from tests.choosing import next_token
from tests.ladder.tiny import model, tokens


def test_simple_appends_the_likeliest_and_sees_a_window() -> None:
    gpt, idx = model(), tokens(2, 10)
    out = generate_text_simple(gpt, idx, 12, context_size=16)
    assert torch.equal(out[:, :10], idx)
    for t in range(10, 22):
        logits = gpt(out[:, max(0, t - 16) : t])[:, -1]
        assert torch.equal(out[:, t], logits.argmax(-1))


def test_generate_at_temperature_0_is_simple() -> None:
    gpt, idx = model(), tokens(2, 10)
    expected = generate_text_simple(gpt, idx, 12, context_size=16)
    assert torch.equal(generate(gpt, idx, 12, 16), expected)
    assert torch.equal(generate(gpt, idx, 12, 16, temperature=0.7, top_k=1), expected)


def test_generate_draws_what_the_package_draws() -> None:
    gpt, idx = model(), tokens(2, 3)
    torch.manual_seed(0)
    ours = generate(gpt, idx, 10, 16, temperature=0.8, top_k=7)
    torch.manual_seed(0)
    for _ in range(10):
        idx = torch.cat([idx, next_token(gpt(idx)[:, -1], temperature=0.8, top_k=7)], dim=1)
    assert torch.equal(ours, idx)


def test_probabilities() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, -1.0]])
    torch.testing.assert_close(next_token_probabilities(logits), logits.softmax(-1))
    torch.testing.assert_close(next_token_probabilities(logits, 0.5), (logits * 2).softmax(-1))
    two = next_token_probabilities(logits, top_k=2)
    torch.testing.assert_close(two[0, [1, 2]], torch.tensor([3.0, 2.0]).softmax(-1))
    assert two[0, 0] == two[0, 3] == 0
    assert next_token_probabilities(logits, 0.0).tolist() == [[0, 1, 0, 0]]
    assert next_token_probabilities(logits, 1e-30).tolist() == [[0, 1, 0, 0]]
    torch.testing.assert_close(next_token_probabilities(logits, top_k=99), logits.softmax(-1))


class Counts(torch.nn.Module):
    """Says that the next token is the last one plus 1."""

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(idx + 1, 100).float()


def test_generation_ends_at_the_end_of_text() -> None:
    idx = torch.tensor([[5]])
    assert generate(Counts(), idx, 10, 16, eos_id=8).tolist() == [[5, 6, 7]]
    two = torch.tensor([[5], [3]])
    assert generate(Counts(), two, 10, 16, eos_id=8).tolist() == [
        [5, 6, 7, 8, 8],
        [3, 4, 5, 6, 7],
    ]
    assert generate(Counts(), two, 3, 16).tolist() == [[5, 6, 7, 8], [3, 4, 5, 6]]


def test_mistakes() -> None:
    with pytest.raises(UserError, match=r"temperature must be 0 or more, got -1"):
        next_token_probabilities(torch.zeros(1, 3), -1)
    with pytest.raises(UserError, match="top_k must be 1 or more, got 0"):
        next_token_probabilities(torch.zeros(1, 3), top_k=0)
