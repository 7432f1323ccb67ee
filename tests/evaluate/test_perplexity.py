import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fastgpt2.config import GPTConfig
from fastgpt2.errors import UserError
from fastgpt2.evaluate.data import Documents, Text
from fastgpt2.evaluate.perplexity import TextScore, score_text
from fastgpt2.evaluate.windows import Windows
from fastgpt2.model import GPT
from fastgpt2.text import BytesTokenizer, build_dataset
from fastgpt2.train.validation import validate
from tests.evaluate.small import TEXT, byte_gpt
from tests.weights.conftest import hf_model


def text_of(ids: list[int]) -> Text:
    return Text(np.array(ids, np.uint16), BytesTokenizer(), None)


def scored(model: GPT, text: Text, context: int, stride: int, batch_size: int = 5) -> TextScore:
    windows = Windows(len(text.tokens), context, stride, model.config.block_size)
    return score_text(model, text, windows, batch_size=batch_size, dtype=torch.float32)


@torch.no_grad()
def slow_losses(model: GPT, ids: list[int], context: int, stride: int) -> dict[int, float]:
    """-log p of each token that counts, by its place: one window at a time, full logits."""
    losses: dict[int, float] = {}
    for begin in range(0, len(ids), stride):
        window = torch.tensor(ids[begin : begin + context])
        log_p = model.logits(window[None, :-1])[0].double().log_softmax(-1)
        for i, token in enumerate(window[1:].tolist()):
            losses.setdefault(begin + 1 + i, -log_p[i, token].item())
        if begin + context >= len(ids):
            break
    return losses


@pytest.mark.parametrize(("context", "stride"), [(24, 12), (24, 1), (24, 24), (25, 24), (7, 3)])
def test_equals_one_window_at_a_time(context: int, stride: int) -> None:
    model = byte_gpt()
    ids = BytesTokenizer().encode(TEXT[:150])
    losses = slow_losses(model, ids, context, stride)
    score = scored(model, text_of(ids), context, stride)
    assert score.tokens_scored == len(losses)
    assert score.loss == pytest.approx(np.mean(list(losses.values())), abs=1e-6)
    assert [w.nll for w in score.worst] == pytest.approx(
        sorted(losses.values(), reverse=True)[: len(score.worst)], abs=1e-5
    )
    for worst in score.worst:
        assert losses[worst.place] == pytest.approx(worst.nll, abs=1e-5)
        assert worst.token == BytesTokenizer().decode(ids[worst.place : worst.place + 1])


@torch.no_grad()
@pytest.mark.parametrize("stride", [128, 64, 32])
def test_equals_the_recipe_of_transformers(tmp_path: Path, stride: int) -> None:
    """https://huggingface.co/docs/transformers/perplexity, as it is printed there.

    The recipe takes one token off the count of every window, though with stride < context only
    the first window has a token with nothing before it; so it weighs windows a little differently.
    """
    config = GPTConfig(block_size=128, vocab_size=65, n_layer=2, n_head=2, n_embd=32)
    model = hf_model(config)
    model.save_pretrained(tmp_path / "hf")
    ids = torch.randint(65, (1, 3000), generator=torch.Generator().manual_seed(3))
    max_length, seq_len = config.block_size, ids.shape[1]
    nll_sum, n_tokens, all_sum, all_tokens = 0.0, 0, 0.0, 0
    prev_end_loc = 0
    for begin_loc in range(0, seq_len, stride):
        end_loc = min(begin_loc + max_length, seq_len)
        target_ids = ids[:, begin_loc:end_loc].clone()
        target_ids[:, : -(end_loc - prev_end_loc)] = -100
        loss = model(ids[:, begin_loc:end_loc], labels=target_ids).loss.item()
        num_loss_tokens = int((target_ids != -100).sum()) - 1
        nll_sum += loss * num_loss_tokens
        n_tokens += num_loss_tokens
        predicted = int((target_ids[:, 1:] != -100).sum())
        all_sum += loss * predicted
        all_tokens += predicted
        prev_end_loc = end_loc
        if end_loc == seq_len:
            break
    ours = GPT.from_pretrained(str(tmp_path / "hf")).eval()
    score = scored(ours, text_of(ids[0].tolist()), max_length, stride)
    assert score.loss == pytest.approx(nll_sum / n_tokens, abs=1e-4)
    assert score.loss == pytest.approx(all_sum / all_tokens, abs=2e-6)
    assert score.tokens_scored == all_tokens


def test_equals_the_validation_loss_of_training() -> None:
    model = byte_gpt()
    dataset = build_dataset(["python-docs"], BytesTokenizer(), val_fraction=0.0005)
    assert dataset.val is not None
    expected = validate(model, dataset, batch_size=3, dtype=torch.float32, poll=lambda: None)
    assert expected is not None
    score = scored(model, Text(dataset.val, dataset.tokenizer, None), 25, 24)
    assert score.tokens_scored == expected.targets > 100
    assert score.loss == pytest.approx(expected.loss, abs=1e-6)


def test_batch_size_changes_nothing() -> None:
    model, text = byte_gpt(), text_of(BytesTokenizer().encode(TEXT[:200]))
    one, many = scored(model, text, 24, 10, 1), scored(model, text, 24, 10, 64)
    assert one.loss == pytest.approx(many.loss, abs=1e-7)
    np.testing.assert_allclose(one.position, many.position, atol=1e-4)
    np.testing.assert_allclose(one.calibration, many.calibration, atol=1e-4)
    assert [w.place for w in one.worst] == [w.place for w in many.worst]


def test_derived_numbers() -> None:
    tokenizer = BytesTokenizer()
    source = Documents("x", "all", "none", ("ab cd\n", "é f"), words=4)
    text = source.tokenize(tokenizer)
    assert text.tokens[:].tolist() == [*b"ab cd\n", 256, *"é f".encode()]
    score = scored(byte_gpt(), text, 24, 12)
    # the first byte is not scored; the end-of-text token is, but it has no bytes
    assert (score.tokens, score.tokens_scored, score.bytes_scored) == (11, 10, 9)
    assert score.perplexity == pytest.approx(math.exp(score.loss))
    assert score.bits_per_byte == pytest.approx(score.loss * 10 / 9 / math.log(2))
    assert score.word_perplexity == pytest.approx(math.exp(score.loss * 11 / 4))
    assert text.first(5).words is None and len(text.first(5).tokens) == 5
    assert text.first(99) is text


def test_positions_and_calibration() -> None:
    model = byte_gpt()
    ids = BytesTokenizer().encode(TEXT[:90])
    score = scored(model, text_of(ids), 24, 24)
    windows = [ids[i : i + 24] for i in range(0, len(ids), 24)]
    with torch.no_grad():
        p = [model.logits(torch.tensor([w[:-1]]))[0].softmax(-1) for w in windows]
    assert score.position[0].tolist()[:3] == [len(windows)] * 3
    sixth = [-q[5, w[6]].log().item() for q, w in zip(p, windows, strict=True)]
    assert score.position[1, 5] == pytest.approx(sum(sixth), abs=1e-5)
    assert score.position[2, 5] == pytest.approx(sum(x * x for x in sixth), abs=1e-4)
    confidence = torch.cat([q.max(-1).values for q in p])
    correct = torch.cat([q.argmax(-1) for q in p]) == torch.tensor(
        [t for w in windows for t in w[1:]]
    )
    assert score.calibration[0].sum() == len(confidence)
    assert score.calibration[1].sum() == pytest.approx(confidence.sum().item(), rel=1e-5)
    assert score.calibration[2].sum() == correct.sum().item()
    in_bin = ((confidence * 10).long() == 0).sum().item()
    assert score.calibration[0, 0] == in_bin


def test_calibration_error_of_known_bins() -> None:
    calibration = np.zeros((3, 10))
    calibration[:, 5] = 10, 5.5, 8
    calibration[:, 9] = 30, 28.5, 27
    score = TextScore(41, 40, 40, None, 1.0, 24, 12, np.zeros((3, 23)), calibration, ())
    assert score.calibration_error == pytest.approx((2.5 + 1.5) / 40)


def test_loss_that_is_not_finite() -> None:
    model = byte_gpt()
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = math.nan
    with pytest.raises(UserError, match="not finite"):
        scored(model, text_of([1, 2, 3, 4]), 4, 2)
