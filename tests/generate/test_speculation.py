"""Speculative decoding changes no distribution."""

from typing import Any

import pytest
import torch

from fastgpt2.generate import TopK
from fastgpt2.model import GPT
from tests.tiny_gpt import tiny_gpt

V, DRAWS = 5, 800


def small(seed: int) -> GPT:
    return tiny_gpt(seed, n_layer=1, n_head=1, n_embd=8, vocab_size=V, block_size=8).eval()


def exact(model: GPT, prompt: list[int], processors: list[Any]) -> torch.Tensor:
    """Probabilities of the next two tokens, (V, V)."""

    def probs(ids: list[int]) -> torch.Tensor:
        logits = model.logits(torch.tensor([ids]))[:, -1]
        for processor in processors:
            logits = processor(None, logits)
        return logits.softmax(-1)[0]

    with torch.no_grad():
        first = probs(prompt)
        return torch.stack([first[a] * probs([*prompt, a]) for a in range(V)])


@pytest.mark.parametrize("aid", ["none", "draft", "lookup"])
def test_pairs_of_tokens_have_their_probabilities(aid: str) -> None:
    model, processors = small(0), [TopK(3)]
    # another model, so that many proposals are refused
    aids: dict[str, dict[str, Any]] = {
        "none": {},
        "draft": {"draft": small(3)},
        "lookup": {"prompt_lookup": 3},
    }
    prompt = [1, 2, 1]
    rows = model.generate([prompt] * DRAWS, 3, seed=11, processors=processors, **aids[aid])
    # the second and third token: those that a proposal may have made
    counts = torch.zeros(V, V)
    for row in rows:
        counts[row[4], row[5]] += 1
    expected = torch.zeros(V, V)
    with torch.no_grad():
        start = exact(model, prompt, processors).sum(1)
    for a in range(V):
        if start[a] > 0:
            expected += start[a] * exact(model, [*prompt, a], processors)
    expected *= DRAWS
    assert (counts[expected == 0] == 0).all()
    likely = expected > 0
    chi_square = ((counts - expected)[likely].square() / expected[likely]).sum()
    degrees = int(likely.sum()) - 1
    # five standard deviations of a chi-square variable above its mean
    assert chi_square < degrees + 5 * (2 * degrees) ** 0.5


def test_a_proposal_saves_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A perfect draft is always taken, and a text that repeats itself is found in the prompt."""
    model = tiny_gpt(block_size=64)
    passes: list[int] = []
    plain = model.hidden_states

    def counted(*arguments: Any) -> Any:
        passes.append(1)
        return plain(*arguments)

    monkeypatch.setattr(model, "hidden_states", counted)
    expected = model.generate([[1, 2, 3]], 40, temperature=0.0)
    assert len(passes) == 40
    passes.clear()
    assert expected == model.generate(
        [[1, 2, 3]], 40, temperature=0.0, draft=tiny_gpt(block_size=64)
    )
    # the prompt, then five tokens a pass
    assert len(passes) <= 10
