import math

import pytest
import torch

from tests.choosing import next_token

LOGITS = torch.tensor([[0.0, 2.0, 1.0, -1.0], [5.0, 0.0, 0.0, 0.0]])


def frequencies(logits: torch.Tensor, **options: float | int) -> torch.Tensor:
    """How often each token of the first row comes up in 20,000 draws."""
    rows = logits[:1].expand(20_000, -1)
    generator = torch.Generator().manual_seed(0)
    drawn = next_token(rows, generator=generator, **options)[:, 0]  # type: ignore[arg-type]
    return torch.bincount(drawn, minlength=logits.shape[1]) / len(drawn)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    expected = torch.softmax(LOGITS[0] / temperature, dim=0)
    # five standard errors of a frequency
    assert (frequencies(LOGITS, temperature=temperature) - expected).abs().max() < 5 * 0.5 / 141


def test_top_k_leaves_the_k_best_in_their_proportions() -> None:
    expected = torch.tensor([0.0, math.e, 1.0, 0.0]) / (1 + math.e)
    result = frequencies(LOGITS, top_k=2)
    assert (result[[0, 3]] == 0).all()
    assert (result - expected).abs().max() < 5 * 0.5 / 141


def test_top_k_beyond_the_vocabulary_changes_nothing() -> None:
    assert torch.equal(frequencies(LOGITS, top_k=100), frequencies(LOGITS))


def test_temperature_0_is_greedy_and_needs_no_randomness() -> None:
    before = torch.get_rng_state()
    token = next_token(LOGITS, temperature=0.0, top_k=3)
    assert (token.tolist(), token.dtype) == ([[1], [0]], torch.int64)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("temperature", [1e-3, 1e-30])
def test_a_temperature_near_0_is_greedy_too(temperature: float) -> None:
    assert next_token(LOGITS * 1e4, temperature=temperature).tolist() == [[1], [0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits(dtype: torch.dtype) -> None:
    """The softmax of 50,000 equal logits does not fit into fp16's sums."""
    token = next_token(torch.zeros(64, 50_000, dtype=dtype), generator=torch.Generator())
    assert len(set(token[:, 0].tolist())) > 60


def test_the_same_generator_gives_the_same_tokens() -> None:
    logits = torch.randn(8, 500)
    first, second = (
        next_token(logits, generator=torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("temperature", "top_k", "message"),
    [
        (-0.1, None, "temperature must be 0 or more, got -0.1"),
        (1.0, 0, "top_k must be an integer of 1 or more, got 0"),
    ],
)
def test_bad_arguments_are_named(temperature: float, top_k: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next_token(LOGITS, temperature=temperature, top_k=top_k)
