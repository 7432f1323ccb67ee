import json
import math
from typing import Any

import pytest
import torch

from docs.walkthrough.build import FULL_SIZE, HERE
from docs.walkthrough.cells import read_cells
from fastgpt2.ladder import (
    GPT_CONFIG_124M,
    BytePairEncoder,
    GPT2Tokenizer,
    GPTModel,
    calc_loss_batch,
    calc_loss_loader,
    create_dataloader,
    text_to_token_ids,
    to_fastgpt2,
    token_ids_to_text,
    train_model_simple,
)
from tests.ladder import published
from tests.ladder.tiny import SMALL, model, story, tokens

TOKENIZER = BytePairEncoder.train(story(), 320)


def test_the_loss_is_the_packages() -> None:
    gpt, idx = model(), tokens(3, 17)
    gpt.out_head.weight = gpt.tok_emb.weight
    loss = calc_loss_batch(idx[:, :-1], idx[:, 1:], gpt, "cpu")
    expected = to_fastgpt2(gpt)(idx[:, :-1], idx[:, 1:])[1]
    torch.testing.assert_close(loss, expected)


def test_the_loader_takes_the_mean_over_the_batches() -> None:
    gpt = model()
    batches = [(tokens(2, 5, seed=i), tokens(2, 5, seed=i + 9)) for i in range(3)]
    losses = [calc_loss_batch(x, y, gpt, "cpu").item() for x, y in batches]
    assert calc_loss_loader(batches, gpt, "cpu") == pytest.approx(sum(losses) / 3)
    assert calc_loss_loader(batches, gpt, "cpu", num_batches=2) == pytest.approx(
        sum(losses[:2]) / 2
    )
    assert calc_loss_loader(batches, gpt, "cpu", 99) == pytest.approx(sum(losses) / 3)
    assert math.isnan(calc_loss_loader([], gpt, "cpu"))


def test_text_there_and_back() -> None:
    ids = text_to_token_ids("the last picture", TOKENIZER)
    assert ids.shape[0] == 1
    assert token_ids_to_text(ids, TOKENIZER) == "the last picture"


def verdict_run(
    epochs: int,
) -> tuple[GPTModel, tuple[list[float], list[float], list[int]]]:
    """The Verdict run on a story and a model of a size for a test: batches of 2, nine tenths for
    training, AdamW with a rate of 4e-4 and weight decay 0.1, here with ten times the rate."""
    torch.manual_seed(123)
    text = story()
    cut = int(0.9 * len(text))
    train_loader = create_dataloader(TOKENIZER.encode(text[:cut]), 2, 16, 16)
    val_loader = create_dataloader(TOKENIZER.encode(text[cut:]), 2, 16, 16, False, False)
    gpt = GPTModel(SMALL | {"vocab_size": TOKENIZER.vocab_size, "drop_rate": 0.1, "emb_dim": 48})
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=4e-3, weight_decay=0.1)
    history = train_model_simple(
        gpt,
        train_loader,
        val_loader,
        optimizer,
        "cpu",
        epochs,
        eval_freq=5,
        eval_iter=5,
        start_context="The painter",
        tokenizer=TOKENIZER,
    )
    return gpt, history


def test_the_verdict_run(capsys: pytest.CaptureFixture[str]) -> None:
    gpt, (train_losses, val_losses, tokens_seen) = verdict_run(epochs=10)
    lines = capsys.readouterr().out.splitlines()
    reports = [line for line in lines if line.startswith("Ep ")]
    samples = [line for line in lines if not line.startswith("Ep ")]
    assert reports[0] == (
        f"Ep 1 (Step 000000): Train loss {train_losses[0]:.3f}, Val loss {val_losses[0]:.3f}"
    )
    assert len(train_losses) == len(val_losses) == len(tokens_seen) == len(reports)
    # an evaluation after 1, 6, 11, ... batches of 2 times 16 tokens
    assert tokens_seen == [32 * (1 + 5 * i) for i in range(len(tokens_seen))]
    assert train_losses[0] == pytest.approx(math.log(TOKENIZER.vocab_size), abs=0.6)
    assert train_losses[-1] < 1.3 < 2.0 < train_losses[0]
    assert val_losses[-1] < val_losses[0] - 2
    # it has learnt how the sentences of the story go
    assert len(samples) == 10
    assert samples[-1].startswith("The painter")
    assert sum(samples[-1].count(name) for name in ("widow", "brother", "stranger", "painter")) > 1
    assert gpt.training


def test_a_step_is_the_gradients_step() -> None:
    inputs, targets = tokens(2, 8), tokens(2, 8, seed=1)
    gpt, other = model(), model()
    optimizer = torch.optim.SGD(gpt.parameters(), lr=0.1)
    batches = [(inputs, targets)]
    train_model_simple(gpt, batches, batches, optimizer, "cpu", 1, 1, 1, "x", AnyText())
    calc_loss_batch(inputs, targets, other, "cpu").backward()  # type: ignore[no-untyped-call]
    for trained, parameter in zip(gpt.parameters(), other.parameters(), strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(trained, parameter - 0.1 * parameter.grad)


def test_the_untrained_loss_the_book_prints(verdict: str, gpt2_tokenizer: GPT2Tokenizer) -> None:
    text = verdict[int(0.9 * len(verdict)) :]
    loader = create_dataloader(text, 2, 256, 256, False, False, tokenizer=gpt2_tokenizer)
    torch.manual_seed(123)
    gpt = GPTModel(GPT_CONFIG_124M | {"context_length": 256}).eval()
    assert calc_loss_loader(loader, gpt, "cpu") == pytest.approx(published.UNTRAINED_LOSS, abs=2e-5)


def test_the_record_at_full_size_is_the_books_run() -> None:
    """What the page holds came from a run whose losses are those the book prints."""
    cells = read_cells(HERE / "sources" / "13_the_verdict.py")
    namespace: dict[str, Any] = {}
    exec(next(cell.source for cell in cells if "BOOK = " in cell.source), namespace)
    lines = (HERE / f"{FULL_SIZE}.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == list(range(0, 90, 5))
    assert [record["tokens"] for record in records] == [512 * (1 + s) for s in range(0, 90, 5)]
    for record, losses in zip(records, namespace["BOOK"], strict=True):
        assert (record["train_loss"], record["val_loss"]) == pytest.approx(losses, abs=0.1)
    assert records[0]["train_loss"] == pytest.approx(namespace["BOOK"][0][0], abs=6e-4)


class AnyText:
    """A tokenizer for a test that does not look at the sample."""

    def encode(self, text: str, /) -> list[int]:
        return [len(text)]

    def decode(self, ids: list[int], /) -> str:
        return str(ids)


def test_the_same_seed_gives_the_same_run() -> None:
    assert verdict_run(1)[1] == verdict_run(1)[1]
