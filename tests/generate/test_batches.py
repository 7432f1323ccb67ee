"""A row's text is the one it has alone: in a batch, padded, queued, speculated, past the window."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt2.config import GPTConfig
from fastgpt2.errors import UserError
from fastgpt2.generate import Generator, MinP, NoRepeatNgram, RepetitionPenalty, TopP
from fastgpt2.model import GPT
from tests.memory import profiled_peak
from tests.tiny_gpt import tiny_batch, tiny_gpt

# short, long, as long as the window of 16, longer, and one of them twice
PROMPTS = [[1, 2, 3], [4], [6, 7] * 8, [*range(40)], [9, 8, 9, 8, 9], [4]]
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "greedy, penalised": {"temperature": 0.0, "processors": [RepetitionPenalty(1.3)]},
    "sampled": {"seed": 3},
    "all of it": {
        "seed": 4,
        "temperature": 0.8,
        "top_k": 20,
        "processors": [TopP(0.9), MinP(0.02), NoRepeatNgram(2)],
    },
    "beams": {"num_beams": 3},
}
HELP: dict[str, dict[str, Any]] = {
    "plain": {},
    "lookup": {"prompt_lookup": 3},
    "draft": {"draft": tiny_gpt(1, n_layer=1)},
    "perfect draft": {"draft": tiny_gpt()},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("window", ["crop", "slide"])
@pytest.mark.parametrize("aid", HELP.values(), ids=HELP)
def test_rows_are_as_if_alone(way: dict[str, Any], window: str, aid: dict[str, Any]) -> None:
    if "num_beams" in way and aid:
        pytest.skip("beams take no help")
    model = tiny_gpt()
    together = model.generate(PROMPTS, 20, window=window, **way, **aid)
    for prompt, row in zip(PROMPTS[:5], together, strict=False):
        assert row[: len(prompt)] == prompt and len(row) == len(prompt) + 20
        assert model.generate([prompt], 20, window=window, **way, **aid) == [row]
    if aid and way.get("temperature") == 0.0:
        assert together == model.generate(PROMPTS, 20, window=window, **way)


def test_rows_that_choose_alike_share_a_call() -> None:
    shapes: list[tuple[int, int]] = []

    def seen(ids: Tensor, logits: Tensor) -> Tensor:
        shapes.append((len(ids), len(logits)))
        return logits

    generator = Generator(tiny_gpt(), batch_size=3)
    for prompt in ([1, 2], [3, 4], [5, 6]):
        generator.submit(prompt, 4, seed=0, processors=[TopP(0.9), seen])
    generator.run()
    assert shapes == [(3, 3)] * 4


def test_a_prompt_that_comes_twice_gives_two_samples() -> None:
    model = tiny_gpt()
    first, second = model.generate([[4], [4]], 20, seed=3)
    assert first != second
    assert [second] == model.generate([[4]], 20, seed=4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("way", [{"temperature": 0.0}, {"seed": 1}])
def test_padded_rows_are_lists(side: str, way: dict[str, Any]) -> None:
    model, rows = tiny_gpt(), PROMPTS[:3]
    T = max(map(len, rows))
    padded, mask = torch.full((3, T), 60), torch.zeros(3, T, dtype=torch.int64)
    for i, row in enumerate(rows):
        place = slice(T - len(row), T) if side == "left" else slice(len(row))
        padded[i, place], mask[i, place] = torch.tensor(row), 1
    result: Tensor = model.generate(padded, 9, attention_mask=mask, **way)
    assert torch.equal(result[:, :T], padded)
    expected = model.generate(rows, 9, **way)
    assert [r[T:].tolist() for r in result] == [
        e[len(row) :] for e, row in zip(expected, rows, strict=True)
    ]


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_waiting_prompts_enter_freed_rows(batch_size: int) -> None:
    model = tiny_gpt()
    lengths = [3, 25, 1, 7, 12, 0]
    generator = Generator(model, batch_size=batch_size)
    streams = [generator.submit(p, n, seed=5) for p, n in zip(PROMPTS, lengths, strict=True)]
    first = next(iter(streams[1]))
    late = generator.submit([30], 4, temperature=0.0)
    generator.run()
    assert streams[1].ids[0] == first and late.finish_reason == "length"
    for prompt, n, stream in zip(PROMPTS, lengths, streams, strict=True):
        alone = Generator(model, batch_size=1).submit(prompt, n, seed=5).wait()
        assert (stream.ids, stream.finish_reason) == (alone.ids, "length")
        assert len(stream.ids) == n


def test_a_cancelled_row_is_free_for_the_next() -> None:
    generator = Generator(tiny_gpt(), batch_size=1)
    first, second = generator.submit([1], 50), generator.submit([2], 2)
    generator.step()
    assert not second.ids
    first.cancel()
    assert len(second.wait().ids) == 2
    assert first.finish_reason == "cancelled" and len(first.ids) == 1


@pytest.mark.parametrize("compile", [False, True])
def test_long_prompts_of_many_rows_take_little_memory(
    compile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call holds the weights, the cache, and a tenth of both at most."""
    monkeypatch.setattr("fastgpt2.generate.slots._LEAST", 0)
    config = GPTConfig(block_size=128, vocab_size=3000, n_layer=4, n_head=2, n_embd=128)
    model = GPT(config).eval()
    prompts = torch.randint(3000, (16, 96)).tolist()
    weights = sum(p.nbytes for p in model.parameters())
    cache = model.make_cache(16, 100).layers
    held = weights + sum(layer.kv.nbytes for layer in cache)

    def call() -> None:
        model.generate(prompts, 4, temperature=0.0, compile=compile)

    assert weights + profiled_peak(call) <= 1.1 * held


def test_the_window_stops() -> None:
    generator = Generator(tiny_gpt(), window="stop")
    stream = generator.submit([1] * 10, 50).wait()
    assert (len(stream.ids), stream.finish_reason) == (7, "window")
    with pytest.raises(UserError, match="17 tokens, but the model's window holds 16"):
        generator.submit([1] * 17, 1)


def test_a_window_that_slides_sees_what_it_states() -> None:
    model = tiny_gpt().eval()
    prompt = tiny_batch(B=1)[0][0].tolist()
    ids = model.generate([prompt], 12, temperature=0.0, window="slide")[0]
    start = 0
    for T in range(16, 28):
        if T - start > 16:
            start = T - 8
        logits = model.logits(torch.tensor([ids[start:T]]))[0, -1]
        assert ids[T] == logits.argmax(), f"token {T}"


def test_stops_end_rows_and_fill_tensors() -> None:
    model = tiny_gpt()
    prompts = torch.tensor([[1, 2], [3, 4]])
    free = model.generate(prompts, 10, temperature=0.0)
    stop = int(free[0, 5])
    at = [row[2:].tolist().index(stop) if stop in row[2:] else 10 for row in free]
    result = model.generate(prompts, 10, temperature=0.0, stop=stop)
    assert result.shape[1] == 2 + max(at)
    for row, expected, n in zip(result, free, at, strict=True):
        assert torch.equal(row[: 2 + n], expected[: 2 + n]) and (row[2 + n :] == stop).all()
    assert model.generate(prompts.tolist(), 10, temperature=0.0, stop=[stop, stop]) == [
        row[: 2 + n].tolist() for row, n in zip(free, at, strict=True)
    ]


def test_when_every_token_is_forbidden_the_text_ends() -> None:
    model = tiny_gpt()
    for aid in HELP.values():
        text = model.generate([[1]], 100, processors=[NoRepeatNgram(1)], seed=0, **aid)[0]
        assert sorted(text) == list(range(61))


def test_log_probabilities_are_the_models() -> None:
    model = tiny_gpt().eval()
    generator = Generator(model)
    streams = [
        generator.submit(p, 8, seed=1, top_k=5, log_probs=True) for p in ([1, 2], [3], [5] * 4)
    ]
    generator.run()
    for stream in streams:
        prompt = list(stream.request.prompt)
        scores = model.log_probs([prompt + stream.ids])[0][len(prompt) - 1 :]
        assert stream.log_probs == pytest.approx(scores, abs=1e-5)


@pytest.mark.parametrize("aid", HELP.values(), ids=HELP)
def test_a_processor_may_work_in_place(aid: dict[str, Any]) -> None:
    """Its edits are not taken for the model's own logits."""

    def halve(ids: Tensor, logits: Tensor) -> Tensor:
        return logits.mul_(0.5)

    def half(ids: Tensor, logits: Tensor) -> Tensor:
        return 0.5 * logits

    first, second = (
        Generator(tiny_gpt(), **aid)
        .submit([1, 2], 8, seed=1, processors=[p], log_probs=True)
        .wait()
        for p in (halve, half)
    )
    assert first.ids == second.ids
    assert first.log_probs == pytest.approx(second.log_probs, abs=1e-6)


def test_scores_are_those_of_the_logits() -> None:
    model = tiny_gpt().eval()
    idx = tiny_batch()[0]
    expected = model.logits(idx).log_softmax(-1)[:, :-1].gather(2, idx[:, 1:, None])[..., 0]
    torch.testing.assert_close(model.log_probs(idx), expected, atol=1e-5, rtol=1e-5)
    rows = model.log_probs([idx[0, :5].tolist(), [7]])
    assert rows[0] == pytest.approx(expected[0, :4].tolist(), abs=1e-5) and rows[1] == []
    # past the window, every token has half of it before it
    assert len(model.log_probs([[1, 2, 3] * 30])[0]) == 89


def test_scores_of_a_batch_are_those_of_its_rows() -> None:
    model = tiny_gpt().eval()
    rows = [*PROMPTS, [5] * 17, [5] * 16]
    together = model.log_probs(rows, batch_size=3)
    for row, values in zip(rows, together, strict=True):
        assert values == pytest.approx(model.log_probs([row])[0], abs=1e-5)
        assert len(values) == len(row) - 1


def test_the_best_of_several_counts_the_stop() -> None:
    """An empty text is not the likeliest one because it has no token that costs something."""
    model = tiny_gpt(vocab_size=3)
    seeds = range(20)
    samples = [model.generate([[1]], 3, seed=seed, stop=2)[0] for seed in seeds]
    ended = [[*row, 2][:4] for row in samples]
    means = [sum(model.log_probs([row])[0]) / (len(row) - 1) for row in ended]
    best = model.generate([[1]], 3, seed=0, stop=2, best_of=20)[0]
    assert best == samples[means.index(max(means))] and [1] in samples


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.generate([[1]], 3, best_of=0), "best_of must be an integer of 1 or more"),
        (lambda m: m.generate([[1]], 3, best_of=2, temperature=0), "best_of: greedy decoding"),
        (lambda m: m.generate([[1]], 3, best_of=2, num_beams=2), "best_of: greedy decoding"),
        (lambda m: m.generate([[1]], "3"), "max_new_tokens must be an integer of 0 or more"),
        (lambda m: m.generate([1], 3), "prompt: expected text or token ids, got 1"),
        (lambda m: m.generate([[1.5]], 3), r"prompt: expected text or token ids, got \[1.5\]"),
        (lambda m: m.log_probs([[1]], batch_size=0), "batch_size must be an integer of 1 or more"),
        (lambda m: m.generate([], 3), "prompts: at least one is needed"),
        (lambda m: m.generate([[]], 3), "prompt: must hold at least one token"),
        (lambda m: m.generate([[61]], 3), r"prompt: id 61 is not in \[0, 61\)"),
        (lambda m: m.generate([[1]], -1), "max_new_tokens must be an integer of 0 or more"),
        (lambda m: m.generate([[1]], 1, temperature=float("nan")), "temperature must be 0 or more"),
        (lambda m: m.generate([[1]], 1, stop=61), r"stop: id 61 is not in \[0, 61\)"),
        (lambda m: m.generate([[1]], 1, seed=-1), r"seed must be an integer in \[0, 2\^63\)"),
        (lambda m: m.generate([[1]], 1, window="wrap"), "window must be one of slide, stop, crop"),
        (lambda m: m.generate([[1]], 1, num_beams=0), "num_beams must be an integer of 1 or more"),
        (lambda m: m.generate([[1]], 1, num_beams=2, top_k=3), "beams draw nothing"),
        (lambda m: m.generate([[1]], 1, processors=[3]), "processors: expected callables, got 3"),
        (lambda m: m.generate([[1]], 1, draft=m, prompt_lookup=2), "exclude each other"),
        (
            lambda m: m.generate([[1]], 1, draft=tiny_gpt(vocab_size=60)),
            "draft: its vocabulary has 60 ids, the model's 61",
        ),
        (
            lambda m: m.generate(
                torch.ones(1, 3).long(), 1, attention_mask=torch.tensor([[1, 0, 1]])
            ),
            "attention_mask: a row's tokens must be adjacent",
        ),
        (lambda m: Generator(m).submit("text"), "prompt: text needs a tokenizer"),
        (lambda m: m.log_probs([[]]), "prompt: must hold at least one token"),
    ],
)
def test_mistakes_are_named(call: Any, message: str) -> None:
    model: GPT = tiny_gpt()
    with pytest.raises(UserError, match=message):
        call(model)
