import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastgpt2.model import GPT
from fastgpt2.text import BytesTokenizer
from fastgpt2.text.dataset import Dataset
from fastgpt2.train.validation import Validation, validate
from tests.tiny_gpt import tiny_gpt


def make_dataset(count: int | None) -> Dataset:
    tokens = np.random.default_rng(0).integers(0, 61, 200, dtype=np.uint16)
    return Dataset(
        train=tokens,
        val=None if count is None else tokens[:count],
        tokenizer=BytesTokenizer(),
        train_bytes=400,
        val_bytes=0 if count is None else 2 * count,
        source="numbers",
    )


def run(
    model: GPT, dataset: Dataset, batch_size: int, dtype: torch.dtype = torch.float32
) -> Validation | None:
    return validate(model, dataset, batch_size=batch_size, dtype=dtype, poll=lambda: None)


# a block is 16: less than one, one and its target, whole blocks, a rest of 1, of many
@pytest.mark.parametrize("count", [2, 17, 33, 34, 111])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_every_token_is_scored_once(count: int, batch_size: int) -> None:
    model = tiny_gpt()
    dataset = make_dataset(count)
    assert dataset.val is not None
    tokens = torch.tensor(np.asarray(dataset.val).astype(np.int64))
    total = 0.0
    for start in range(0, count - 1, 16):
        idx, targets = tokens[start : start + 16], tokens[start + 1 : start + 17]
        logits = model.logits(idx[: len(targets)][None])[0]
        total += F.cross_entropy(logits, targets, reduction="sum").item()
    result = run(model, dataset, batch_size)
    assert result is not None
    assert result.targets == count - 1
    assert result.loss == pytest.approx(total / (count - 1), rel=1e-5)


def test_it_evaluates_without_dropout_and_leaves_the_mode_alone() -> None:
    dataset = make_dataset(50)
    model = tiny_gpt(dropout=0.5)
    assert model.training
    first, second = run(model, dataset, 2), run(model, dataset, 2)
    assert first == second
    assert model.training
    assert run(model.eval(), dataset, 2) == first
    assert not model.training


def test_it_keeps_no_graph_and_draws_no_random_numbers() -> None:
    state = torch.get_rng_state()
    model = tiny_gpt(dropout=0.5)
    torch.set_rng_state(state)
    run(model, make_dataset(50), 2)
    assert torch.get_rng_state().equal(state)
    assert all(p.grad is None for p in model.parameters())


def test_it_computes_in_the_dtype_of_training() -> None:
    model = tiny_gpt()
    exact, rounded = (run(model, make_dataset(50), 2, d) for d in (torch.float32, torch.bfloat16))
    assert exact is not None
    assert rounded is not None
    assert exact.loss != rounded.loss
    assert exact.loss == pytest.approx(rounded.loss, rel=1e-2)


def test_no_validation_split() -> None:
    assert run(tiny_gpt(), make_dataset(None), 2) is None


def test_an_interrupted_evaluation_leaves_the_mode_alone() -> None:
    def poll() -> None:
        raise InterruptedError

    model = tiny_gpt()
    with pytest.raises(InterruptedError):
        validate(model, make_dataset(50), batch_size=2, dtype=torch.float32, poll=poll)
    assert model.training


def test_what_people_read() -> None:
    result = Validation(loss=math.log(8.0), targets=100, text_bytes=400)
    assert result.perplexity == pytest.approx(8.0)
    assert result.nats_per_byte == pytest.approx(math.log(8.0) / 4)
    assert result.bits_per_byte == pytest.approx(0.75)
    assert Validation(1000.0, 1, 1).perplexity == math.inf
    assert math.isnan(Validation(math.nan, 1, 1).perplexity)
