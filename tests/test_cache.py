"""Cached decoding equals the full forward pass."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt2.cache import KVCache
from fastgpt2.generate.slots import Slots
from fastgpt2.kernels import mlp
from fastgpt2.model import GPT
from tests.choosing import next_token
from tests.tiny_gpt import tiny_batch, tiny_config, tiny_gpt


def step_by_step(
    model: GPT, idx: Tensor, count: int, temperature: float, top_k: int | None, seed: int
) -> Tensor:
    """Generation in its plainest form: the whole text through the model for every token."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        logits = model.logits(idx[:, -model.config.block_size :])[:, -1]
        token = next_token(logits, temperature=temperature, top_k=top_k, generator=generator)
        idx = torch.cat([idx, token], dim=1)
    return idx


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize(("temperature", "top_k"), [(0.0, None), (1.0, None), (0.8, 5)])
# within the block, past it, from its last position, from far beyond it
@pytest.mark.parametrize(("T", "count"), [(5, 8), (5, 20), (15, 5), (16, 4), (30, 4)])
def test_generate_equals_the_full_forward(
    impl: str, temperature: float, top_k: int | None, T: int, count: int
) -> None:
    model = tiny_gpt(impl=impl).eval()
    idx = torch.randint(61, (3, T), generator=torch.Generator().manual_seed(2))
    expected = step_by_step(model, idx, count, temperature, top_k, seed=7)
    generator = torch.Generator().manual_seed(7)
    result = model.generate(idx, count, temperature, top_k, generator)
    assert torch.equal(result, expected)


def test_cached_logits_are_those_of_the_full_forward() -> None:
    model = tiny_gpt().eval()
    text = tiny_batch()[0]
    slots = Slots(model, 3, 16)
    for T in range(5, 17):
        new = text[:, slots.lengths[0] : T].tolist()
        with torch.no_grad():
            logits = slots.feed(0, new)
        torch.testing.assert_close(logits, model.logits(text[:, :T])[:, -1], atol=1e-5, rtol=1e-5)
        assert slots.lengths == slots.cache.lengths.tolist() == [T] * 3
    assert slots.cache.size == 16


def test_the_cache_is_no_larger_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = tiny_gpt().eval(), []

    def make_cache(batch_size: int, size: int) -> KVCache:
        made.append(GPT.make_cache(model, batch_size, size))
        return made[-1]

    monkeypatch.setattr(model, "make_cache", make_cache)
    # the last token that is generated needs no place
    model.generate(tiny_batch(T=4)[0], 4)
    (cache,) = made
    assert (cache.size, cache.layers[0].k.shape) == (7, (3, 4, 7, 12))


def test_generation_works_in_eval_mode_and_leaves_the_mode_alone() -> None:
    model = tiny_gpt(dropout=0.5)
    idx = tiny_batch(T=4)[0]
    first, second = (model.generate(idx, 10, temperature=0.0) for _ in range(2))
    assert torch.equal(first, second)
    assert model.training
    model.eval().generate(idx, 1)
    assert not model.training


def test_nothing_to_generate() -> None:
    idx = tiny_batch()[0]
    assert torch.equal(tiny_gpt().generate(idx, 0), idx)


@pytest.mark.parametrize("only_last", [False, True])
def test_unequal_prompts_in_one_batch(only_last: bool) -> None:
    """Right-padded prompts through the public cache: each row as if it were alone."""
    model = tiny_gpt().eval()
    lengths = torch.tensor([3, 9, 6])
    text = tiny_batch(T=16)[0]
    prompts = text[:, :9].clone()
    for row, length in enumerate(lengths.tolist()):
        # whatever stands in the padding must not matter
        prompts[row, length:] = 60 - row
    cache = KVCache(model.config, 3, 16, text.device, torch.float32)
    rows = torch.arange(3)
    if only_last:
        last = model.hidden_states(prompts, cache, wanted=lengths - 1)[:, 0]
    else:
        last = model.hidden_states(prompts, cache)[rows, lengths - 1]
    cache.advance(lengths)
    for _ in range(6):
        for row, length in enumerate(cache.lengths.tolist()):
            alone = model.hidden_states(text[row : row + 1, :length])[0, -1]
            torch.testing.assert_close(last[row], alone, atol=1e-5, rtol=1e-5)
        last = model.hidden_states(text[rows, cache.lengths][:, None], cache)[:, -1]
        cache.advance(1)


def test_wanted_tokens_after_a_prompt() -> None:
    """Several more tokens of each row, of which only one is computed to the end."""
    model, text = tiny_gpt().eval(), tiny_batch(T=16)[0]
    whole, part = (KVCache(model.config, 3, 16, text.device, torch.float32) for _ in range(2))
    wanted = torch.tensor([4, 0, 2])
    with torch.no_grad():
        for cache in (whole, part):
            model.hidden_states(text[:, :7], cache)
            cache.advance(7)
        expected = model.hidden_states(text[:, 7:12], whole)[torch.arange(3), wanted]
        got = model.hidden_states(text[:, 7:12], part, wanted=wanted)
    assert got.shape == (3, 1, model.config.n_embd)
    torch.testing.assert_close(got[:, 0], expected, atol=1e-5, rtol=1e-5)
    for layers in zip(whole.layers, part.layers, strict=True):
        assert torch.equal(*(layer.kv for layer in layers))


@torch.no_grad()
def test_the_last_block_of_a_prompt_computes_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []

    def seen(x: Tensor, *rest: Any, **options: Any) -> Tensor:
        shapes.append(tuple(x.shape[:2]))
        return mlp(x, *rest, **options)

    monkeypatch.setattr("fastgpt2.layers.mlp", seen)
    slots = Slots(tiny_gpt(impl="reference").eval(), 2, 16)
    slots.feed(0, [[1, 2, 3, 4], [5, 6]])
    slots.feed(0, [[1, 2], [3, 4]], every=True)
    assert shapes == [(2, 4), (2, 1), (2, 2), (2, 2)]


@torch.no_grad()
def test_a_hook_in_the_last_block_sees_the_whole_prompt() -> None:
    model, seen = tiny_gpt().eval(), []
    hidden = model.get_submodule("transformer.h.1.mlp.c_fc")
    handle = hidden.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    hooked = model.generate([[1, 2, 3, 4]], 2, 0.0)
    handle.remove()
    assert seen == [4, 1]
    assert hooked == model.generate([[1, 2, 3, 4]], 2, 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cache_has_the_compute_dtype(dtype: torch.dtype) -> None:
    idx = tiny_batch(T=4)[0]
    with torch.autocast("cpu", dtype=dtype):
        model = tiny_gpt().eval()
        cache = Slots(model, 3, 8).cache
        # longer than the block, so both ways of decoding are taken
        assert model.generate(idx, 20).shape == (3, 24)
    assert cache.layers[0].k.dtype == dtype
    slots = Slots(tiny_gpt().to(dtype), 3, 8)
    with torch.no_grad():
        assert slots.feed(0, idx.tolist()).dtype == dtype


def test_an_empty_cache_says_so() -> None:
    cache = KVCache(tiny_config(), 1, 4, torch.device("cpu"), torch.float32)
    assert cache.is_empty
    tiny_gpt().hidden_states(torch.zeros(1, 2, dtype=torch.int64), cache)
    assert not cache.is_empty
