"""Each processor against transformers' own, or against its formula, on the same logits."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.generation import logits_process as theirs

from fastgpt2 import generate as ours
from fastgpt2.errors import UserError
from fastgpt2.generate.options import Options
from tests.test_model_transformers import theirs as of_transformers
from tests.tiny_gpt import tiny_gpt

V = 61


def inputs(B: int, T: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(V, (B, T), generator=generator)
    return ids, 3.0 * torch.randn(B, V, generator=generator)


def odd(value: Any) -> Any:
    """A value of another type than a processor declares."""
    return value


PAIRS: dict[str, tuple[Any, Any]] = {
    "temperature": (ours.Temperature(0.7), theirs.TemperatureLogitsWarper(0.7)),
    "top-k": (ours.TopK(7), theirs.TopKLogitsWarper(7)),
    "top-k of 1": (ours.TopK(1), theirs.TopKLogitsWarper(1)),
    "top-k beyond V": (ours.TopK(1000), theirs.TopKLogitsWarper(1000)),
    "top-p": (ours.TopP(0.8), theirs.TopPLogitsWarper(0.8)),
    "top-p of 0": (ours.TopP(0.0), theirs.TopPLogitsWarper(0.0)),
    "min-p": (ours.MinP(0.1), theirs.MinPLogitsWarper(0.1)),
    "min-p of 1": (ours.MinP(1.0), theirs.MinPLogitsWarper(1.0)),
    "typical": (ours.Typical(0.6), theirs.TypicalLogitsWarper(0.6)),
    "repetition": (ours.RepetitionPenalty(1.4), theirs.RepetitionPenaltyLogitsProcessor(1.4)),
    "no repeated word": (ours.NoRepeatNgram(1), theirs.NoRepeatNGramLogitsProcessor(1)),
    "no repeated pair": (ours.NoRepeatNgram(2), theirs.NoRepeatNGramLogitsProcessor(2)),
    "no repeated 3": (ours.NoRepeatNgram(3), theirs.NoRepeatNGramLogitsProcessor(3)),
    "bias": (
        ours.LogitBias({3: -2.5, 60: 4.0}),
        theirs.SequenceBiasLogitsProcessor([[[3], -2.5], [[60], 4.0]]),
    ),
    "minimum length": (ours.MinLength(9, [4, 5]), theirs.MinLengthLogitsProcessor(9, [4, 5])),
    "minimum reached": (ours.MinLength(4, 5), theirs.MinLengthLogitsProcessor(4, 5)),
}


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("B", "T"), [(1, 1), (3, 8), (2, 40)])
def test_it_does_what_theirs_does(pair: tuple[Any, Any], B: int, T: int, seed: int) -> None:
    ids, logits = inputs(B, T, seed)
    # an ids row with pairs that come again
    ids[:, T // 2 :] = ids[:, : T - T // 2].clone()
    before = logits.clone()
    result, expected = pair[0](ids, logits), pair[1](ids, logits.clone())
    assert torch.equal(logits, before), "its input has changed"
    assert torch.equal(result.isinf(), expected.isinf())
    # a temperature may shift all logits alike, which their softmax does not see
    torch.testing.assert_close(result.softmax(-1), expected.softmax(-1), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("p", [0.0, 0.3, 0.9, 0.999, 1.0])
def test_top_p_needs_not_sort_a_whole_vocabulary(p: float) -> None:
    """Peaked and flat rows of a vocabulary beyond the tokens that are looked at first."""
    logits = torch.randn(6, 9000, generator=torch.Generator().manual_seed(0))
    logits *= torch.tensor([0.0, 0.1, 1.0, 3.0, 10.0, 100.0])[:, None]
    logits[3, ::2] = -math.inf
    result = ours.TopP(p)(torch.zeros(6, 1), logits)
    # rows of equal logits: which of them are kept is open, how many is not
    expected = theirs.TopPLogitsWarper(p)(torch.zeros(6, 1), logits)
    assert torch.equal(result[1:], expected[1:])
    assert (result[0] > -math.inf).sum() == (expected[0] > -math.inf).sum()
    alone = [ours.TopP(p)(torch.zeros(1, 1), row[None]) for row in logits]
    assert torch.equal(torch.cat(alone), result)


@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, 0.9])
def test_of_equal_tokens_top_p_keeps_those_that_theirs_keeps(p: float) -> None:
    logits = torch.stack([torch.zeros(V), torch.arange(V) % 2.0, torch.arange(V) % 3.0])
    ids = torch.zeros(3, 1, dtype=torch.int64)
    assert torch.equal(ours.TopP(p)(ids, logits), theirs.TopPLogitsWarper(p)(ids, logits))


def test_options_compose_in_the_order_of_theirs() -> None:
    """A bias comes before the penalty for repetitions: then the penalty sees it."""
    model = tiny_gpt(1, block_size=32).eval()
    bias = {15: 8.0, 42: 7.0, 3: 6.0}
    options = Options().replaced({"repetition_penalty": 3.0, "logit_bias": bias})
    expected = of_transformers(model).generate(
        torch.tensor([[5]]),
        max_new_tokens=9,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        repetition_penalty=3.0,
        sequence_bias=[[[id_], value] for id_, value in bias.items()],
    )
    result = model.generate([[5]], 9, temperature=0, processors=options.processors())
    assert result == expected.tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_logits_keep_their_dtype(dtype: torch.dtype) -> None:
    ids, logits = inputs(2, 4, 0)
    for ours_, _ in PAIRS.values():
        assert ours_(ids, logits.to(dtype)).dtype == dtype
    for penalty in (ours.PresencePenalty(0.3), ours.FrequencyPenalty(0.3)):
        assert penalty(ids, logits.to(dtype)).dtype == dtype


@pytest.mark.parametrize("number", [np.int64(3), torch.tensor(3), np.array(3)[()]])
def test_numbers_of_numpy_and_torch(number: Any) -> None:
    ids, logits = inputs(2, 9, 0)
    half: Any = np.float32(0.5)
    for processor, expected in (
        (ours.TopK(number), ours.TopK(3)),
        (ours.NoRepeatNgram(number), ours.NoRepeatNgram(3)),
        (ours.MinLength(10, [number]), ours.MinLength(10, 3)),
        (ours.LogitBias({number: half}), ours.LogitBias({3: 0.5})),
        (ours.Temperature(half), ours.Temperature(0.5)),
        (ours.MinP(odd(torch.tensor(0.5))), ours.MinP(0.5)),
        (ours.RepetitionPenalty(half), ours.RepetitionPenalty(0.5)),
    ):
        assert processor == expected
        assert torch.equal(processor(ids, logits), expected(ids, logits))


def test_presence_and_frequency_follow_their_formulas() -> None:
    ids, logits = torch.tensor([[3, 3, 5]]), torch.zeros(1, 7)
    assert ours.PresencePenalty(0.5)(ids, logits).tolist() == [[0, 0, 0, -0.5, 0, -0.5, 0]]
    assert ours.FrequencyPenalty(0.5)(ids, logits).tolist() == [[0, 0, 0, -1.0, 0, -0.5, 0]]


def test_greedy_leaves_the_best_token_alone() -> None:
    result = ours.Temperature(0)(torch.zeros(1, 1), torch.tensor([[0.5, 2.0, 1.0]]))
    assert result.tolist() == [[-math.inf, 2.0, -math.inf]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ours.Temperature(math.nan), "temperature must be 0 or more, got nan"),
        (lambda: ours.Temperature(math.inf), "temperature must be 0 or more, got inf"),
        (lambda: ours.TopK(0), "top_k must be an integer of 1 or more, got 0"),
        (lambda: ours.TopP(1.5), r"top_p must be in \[0, 1\], got 1.5"),
        (lambda: ours.MinP(math.nan), r"min_p must be in \[0, 1\], got nan"),
        (lambda: ours.Typical(0), r"typical must be in \(0, 1\], got 0"),
        (lambda: ours.RepetitionPenalty(0.0), "repetition_penalty must be a positive number"),
        (lambda: ours.PresencePenalty(math.inf), "presence_penalty must be a finite number"),
        (lambda: ours.FrequencyPenalty(math.nan), "frequency_penalty must be a finite number"),
        (lambda: ours.NoRepeatNgram(0), "no_repeat_ngram must be an integer of 1 or more"),
        (lambda: ours.LogitBias({-1: 1.0}), "logit_bias: an id must be 0 or more, got -1"),
        (lambda: ours.LogitBias({1: math.nan}), "the bias of 1 must be a finite number, or -inf"),
        (lambda: ours.MinLength(-1, 5), "min_length must be an integer of 0 or more"),
        (lambda: ours.TopK(True), "top_k must be an integer of 1 or more, got True"),
        (
            lambda: ours.TopK(odd(torch.tensor(True))),
            "top_k must be an integer of 1 or more, got True",
        ),
        (lambda: ours.NoRepeatNgram(True), "no_repeat_ngram must be an integer of 1 or more"),
        (
            lambda: ours.Temperature(odd(np.float32("nan"))),
            "temperature must be 0 or more, got nan",
        ),
        (lambda: ours.MinLength(3, [-1]), "min_length: a stop id must be 0 or more, got -1"),
        (lambda: ours.MinLength(3, odd(["a"])), "min_length: a stop id must be 0 or more, got 'a'"),
        (lambda: ours.LogitBias(odd([(3, 1.0)])), "logit_bias must be a mapping of token ids"),
        (lambda: ours.LogitBias({True: 1.0}), "logit_bias: an id must be 0 or more, got True"),
    ],
)
def test_bad_options_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_a_bias_outside_the_vocabulary() -> None:
    with pytest.raises(UserError, match=r"id 61 is not in \[0, 61\)"):
        ours.LogitBias({61: 1.0})(*inputs(1, 2, 0))


def test_a_stop_outside_the_vocabulary() -> None:
    with pytest.raises(UserError, match=r"id 61 is not in \[0, 61\)"):
        ours.MinLength(9, [3, 61])(*inputs(1, 2, 0))


@pytest.mark.parametrize("value", [10**25, 1e25])
def test_long_integers_are_numbers_like_any_other(value: float) -> None:
    ids, logits = inputs(1, 2, 0)
    for processor in (
        ours.RepetitionPenalty(value),
        ours.PresencePenalty(value),
        ours.FrequencyPenalty(value),
        ours.LogitBias({1: value}),
        ours.Temperature(value),
    ):
        assert processor(ids, logits).isfinite().all()
