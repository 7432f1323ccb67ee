"""The step in C++: the logits and texts of the model itself, in every form."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt2.generate import Generator, TopP
from fastgpt2.generate.chooser import Chooser
from fastgpt2.generate.compiled import MAX_TOKENS
from fastgpt2.generate.slots import Slots
from fastgpt2.model import GPT
from fastgpt2.quantize import QuantizedLinear
from tests.generate.compiled_step import compiled_slots, needs_compiler
from tests.tiny_gpt import tiny_gpt

pytestmark = pytest.mark.usefixtures("libraries")


def wide_gelu() -> GPT:
    """A model whose GELUs get numbers of several units, where its polynomial counts."""
    model = tiny_gpt()
    for i in range(2):
        model.get_parameter(f"transformer.h.{i}.mlp.c_fc.weight").data.mul_(4)
        model.get_parameter(f"transformer.h.{i}.mlp.c_proj.weight").data.mul_(4)
    return model


FORMS: dict[str, Callable[[], GPT]] = {
    "fp32": tiny_gpt,
    "no bias": lambda: tiny_gpt(bias=False),
    "erf": lambda: tiny_gpt(gelu="erf"),
    "wide GELU": wide_gelu,
    "padded vocabulary": lambda: tiny_gpt(vocab_size=61),
    # no multiple of a processor's vectors
    "odd sizes": lambda: tiny_gpt(n_embd=33, n_head=3, vocab_size=37),
    # whose values do not fit into the registers at once
    "wide head": lambda: tiny_gpt(n_embd=80, n_head=1),
    # of matrix units: more columns than they get at once, features beyond the last tile
    "wide": lambda: tiny_gpt(n_layer=1, n_embd=320, vocab_size=75),
    "int8": lambda: tiny_gpt().quantize("int8"),
    "int8, wide": lambda: tiny_gpt(n_layer=1, n_embd=320, vocab_size=75).quantize("int8"),
    # a rest of every kind, and more than nothing before it
    "int8, odd sizes": lambda: tiny_gpt(n_embd=99, n_head=3).quantize("int8"),
}
WEIGHT = "transformer.h.0.mlp.c_fc.weight"
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10]]


@pytest.fixture(scope="module")
def model() -> GPT:
    """One layer, and positions enough for texts of different lengths."""
    return tiny_gpt(n_layer=1, n_head=2, n_embd=16, block_size=200).eval()


def as_the_step_reads(model: GPT) -> GPT:
    """The model; of int8, with what its matrices read rounded to int16 by a scale per row."""

    def rounded(_: torch.nn.Module, rows: tuple[Tensor]) -> Tensor:
        scales = rows[0].abs().amax(-1, keepdim=True) / 32639
        return (rows[0] / scales).round() * scales

    model = copy.deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, QuantizedLinear):
            layer.register_forward_pre_hook(rounded)
    return model


def rms(x: Tensor) -> float:
    return x.float().square().mean().sqrt().item()


def texts_of(rows: int, length: int) -> list[list[int]]:
    return torch.randint(37, (rows, length), generator=torch.Generator().manual_seed(2)).tolist()


def uncached(model: GPT, texts: list[list[int]]) -> Tensor:
    """The logits after every token (B, T, V)."""
    with torch.no_grad():
        return model.logits(torch.tensor(texts))


@needs_compiler
class TestLogits:
    """Cached equals uncached."""

    @pytest.mark.parametrize("threads", [1, 3])
    @pytest.mark.parametrize("form", FORMS)
    def test_every_form(self, form: str, threads: int) -> None:
        # 7 rows are 4, 2 and 1; then tokens one by one, two and three at once
        model, texts = FORMS[form]().eval(), texts_of(7, 16)
        gold, slots = uncached(model, texts), compiled_slots(model, 7, 16)
        assert slots.compiled is not None
        start = 0
        for count in (1, 1, 3, 2, 4, 4, 1):
            # a prompt is new weights, so a new step
            slots.compiled._threads = threads
            new = [text[start : start + count] for text in texts]
            logits = slots.feed(0, new, every=True)
            expected = gold[:, start : start + count]
            if form.startswith("int8"):
                # nine products after each other, whose rows are rounded by 2^-15 / sqrt(12) of a
                # largest entry that is about three times the others
                assert rms(logits - expected) < 1e-4 * rms(expected)
            else:
                torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)
            start += count

    @pytest.mark.parametrize("width", [64, 99, 128])
    def test_int8_meets_rows_rounded_to_int16(self, width: int) -> None:
        model = tiny_gpt(n_embd=width, n_head=1).eval().quantize("int8")
        texts = texts_of(7, 9)
        slots = compiled_slots(model, 7, 9)
        slots.feed(0, texts)
        cache = model.make_cache(7, 9)
        with torch.no_grad():
            as_the_step_reads(model).hidden_states(torch.tensor(texts), cache)
        # the first product's; later ones would read other roundings of what is not quite the same
        expected, found = cache.layers[0].kv, slots.cache.layers[0].kv
        assert rms(found - expected) < 5e-6 * rms(expected)

    @pytest.mark.parametrize("width", [64, 80, 99])
    def test_int8_of_one_row_is_that_of_many(self, width: int) -> None:
        """Bit for bit, at any number of tokens: integers' sums are exact."""
        model = tiny_gpt(n_embd=width, n_head=1).eval().quantize("int8")
        texts = texts_of(7, 9)
        together = compiled_slots(model, 7, 16).feed(0, texts, every=True)
        alone = compiled_slots(model, 1, 16)
        for text, expected in zip(texts, together, strict=True):
            alone.cut([0])
            for start, count in ((0, 1), (1, 2), (3, 6)):
                logits = alone.feed(0, [text[start : start + count]], every=True)
                assert torch.equal(logits[0], expected[start : start + count])

    def test_long_rows_of_the_largest_integers(self) -> None:
        """Their sums fit into 32 bits only if they are taken out of the registers in between."""
        model = tiny_gpt(n_layer=1, n_head=1, n_embd=1056, block_size=2, vocab_size=5).eval()
        mlp = "transformer.h.0.mlp"
        model.get_parameter(f"{mlp}.c_fc.weight").data.zero_()
        model.get_parameter(f"{mlp}.c_fc.bias").data.fill_(1e-4)
        # every feature is now 4,224 equal numbers' sum, or its negative, and about what it is
        # added to
        signs = torch.randn(1056, 1, generator=torch.Generator().manual_seed(3)).sign()
        model.get_parameter(f"{mlp}.c_proj.weight").data[:] = signs
        model.quantize("int8")
        texts = [[token] for token in range(5)]
        gold = uncached(model, texts)[:, 0]
        logits = compiled_slots(model, 5, 2).feed(0, texts)
        torch.testing.assert_close(logits, gold, atol=1e-3 * gold.abs().max().item(), rtol=0)

    def test_int8_of_rows_that_are_zero_or_not_finite(self) -> None:
        model = tiny_gpt(bias=False).eval()
        model.get_parameter("transformer.h.0.ln_1.weight").data.zero_()
        model.get_parameter("transformer.wpe.weight").data[1, 3] = torch.inf
        model.quantize("int8")
        texts = texts_of(3, 2)
        logits = compiled_slots(model, 3, 4).feed(0, texts, every=True)
        # the first token's alone: elsewhere 0 times infinity reaches it
        gold = uncached(model, [text[:1] for text in texts])[:, 0]
        assert rms(logits[:, 0] - gold) < 1e-4 * rms(gold)
        assert logits[:, 1].isnan().all()

    def test_rows_of_unequal_length(self) -> None:
        model, texts = tiny_gpt().eval(), texts_of(3, 12)
        slots, gold = compiled_slots(model, 3, 16), uncached(model, texts)
        # prompts of 2, 4 and 1 tokens, and of each row the logits after its own last one
        logits = slots.feed(0, [texts[0][:2], texts[1][:4], texts[2][:1]])
        expected = torch.stack([gold[0, 1], gold[1, 3], gold[2, 0]])
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)
        assert slots.lengths == [2, 4, 1]
        # only the last two rows go on; then all
        logits = slots.feed(1, [[texts[1][4]], [texts[2][1]]])
        torch.testing.assert_close(logits, gold[[1, 2], [4, 1]], atol=2e-5, rtol=1e-5)
        logits = slots.feed(0, [[texts[0][2]], [texts[1][5]], [texts[2][2]]])
        torch.testing.assert_close(logits, gold[[0, 1, 2], [2, 5, 2]], atol=2e-5, rtol=1e-5)

    @pytest.mark.parametrize("width", [48, 64])
    @pytest.mark.parametrize("form", ["plain", "fp32_residual", "int8"])
    def test_bf16(self, form: str, width: int) -> None:
        options = {"fp32_residual": form == "fp32_residual", "n_embd": width}
        model = tiny_gpt(**options).eval().bfloat16()
        if form == "int8":
            model.quantize("int8")
        texts = texts_of(2, 12)
        slots = compiled_slots(model, 2, 16)
        slots.feed(0, [text[:2] for text in texts])
        # the first layer's keys and values are those of fp32, rounded to the nearest
        same = compiled_slots(copy.deepcopy(model).float(), 2, 16)
        same.feed(0, [text[:2] for text in texts])
        exact = same.cache.layers[0].kv[:, :, :, :2].bfloat16()
        for t in range(2, 12):
            logits = slots.feed(0, [text[t : t + 1] for text in texts])
        assert logits.dtype == slots.cache.layers[0].kv.dtype == torch.bfloat16
        assert torch.equal(slots.cache.layers[0].kv[:, :, :, :2], exact)
        # one rounding of each key, value and result: as near to fp32 as bf16 itself is
        gold = uncached(model.float(), texts)[:, -1]
        assert (logits.float() - gold).abs().max() < 0.02 * gold.abs().max()

    @pytest.mark.parametrize("rows", [6, 9, 17, 32])
    def test_several_rows_of_bf16(self, rows: int) -> None:
        """They are cut into two numbers of bf16 at the worst: to 17 bits."""
        model = tiny_gpt(n_layer=1, n_embd=320).eval().bfloat16()
        texts = texts_of(rows, 1)
        slots = compiled_slots(model, rows, 4)
        logits = slots.feed(0, texts)
        same = compiled_slots(copy.deepcopy(model).float(), rows, 4)
        gold = same.feed(0, texts)
        exact = same.cache.layers[0].kv[:, :, :, :1].bfloat16()
        found = slots.cache.layers[0].kv[:, :, :, :1]
        # the nearest bf16 is another where the exact one lies in the middle between two
        assert (found != exact).float().mean(dim=(0, 2, 3, 4)).max() < 0.02
        assert (found != exact).float().mean() < 0.008
        assert rms(found - exact) < 3e-4 * rms(exact)
        assert rms(logits - gold) < 0.004 * rms(gold)

    def test_more_tokens_than_it_takes_go_to_the_library(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = tiny_gpt(block_size=200, n_embd=64).eval()
        texts, slots = texts_of(9, MAX_TOKENS), compiled_slots(model, 9, 200)
        short = compiled_slots(copy.deepcopy(model).quantize("int8"), 9, 200)
        with monkeypatch.context() as patch:
            patch.setattr(Slots, "_compiled_step", None)
            logits = slots.feed(0, texts)
            # but there is none for int8
            with pytest.raises(TypeError, match="NoneType"):
                short.feed(0, texts)
        torch.testing.assert_close(logits, uncached(model, texts)[:, -1], atol=2e-5, rtol=1e-5)
        gold = uncached(short.model, texts)[:, -1]
        assert rms(short.feed(0, texts) - gold) < 1e-4 * rms(gold)

    def test_it_follows_the_weights(self) -> None:
        model, texts = tiny_gpt().eval(), texts_of(1, 6)
        slots = compiled_slots(model, 1, 16)
        slots.feed(0, texts)
        with torch.no_grad():
            # another tensor, not another value in the same one
            layer = model.get_submodule("transformer.h.0.mlp.c_fc")
            layer.weight = torch.nn.Parameter(2 * model.get_parameter(WEIGHT))
        slots.cut([0])
        expected = uncached(model, texts)[:, -1]
        torch.testing.assert_close(slots.feed(0, texts), expected, atol=2e-5, rtol=1e-5)

    def test_a_converted_model_has_no_step_for_the_cache(self) -> None:
        model, texts = tiny_gpt().bfloat16().eval(), texts_of(2, 20)
        slots = compiled_slots(model, 2, 32)
        model.float()
        with pytest.raises((TypeError, RuntimeError), match=r"dtype|bfloat16"):
            slots.feed(0, [[3]] * 2)
            slots.feed(0, texts)
        assert slots.compiled is None

    def test_what_does_not_fit_is_refused(self) -> None:
        slots = compiled_slots(tiny_gpt().eval(), 1, 8)
        for wrong in ([[61]], [[-1]], [[1] * 9]):
            with pytest.raises(IndexError):
                slots.feed(0, wrong)
        assert slots.lengths == [0]


@needs_compiler
@pytest.mark.parametrize("way", [{"temperature": 0.0}, {"seed": 3, "top_k": 9}])
def test_the_same_text(model: GPT, way: dict[str, Any]) -> None:
    expected = model.generate(PROMPTS, 80, **way)
    assert model.generate(PROMPTS, 80, compile=True, **way) == expected
    # rows come and go, past the window and to its end
    engine = Generator(model, batch_size=3, compile=True)
    streams = [engine.submit(p, n, temperature=0.0) for p in PROMPTS for n in (3, 60, 210)]
    engine.run()
    for stream in streams:
        prompt, n = stream.request.prompt, stream.request.max_new_tokens
        assert model.generate([prompt], n, 0.0, window="slide") == [[*prompt, *stream.ids]]


@needs_compiler
@pytest.mark.parametrize("options", [{"prompt_lookup": 3}, {"draft": None, "proposals": 3}])
def test_proposals_are_verified(model: GPT, options: dict[str, Any]) -> None:
    if "draft" in options:
        options = options | {"draft": tiny_gpt(1, n_layer=1, n_head=2, n_embd=16, block_size=200)}
    engine = Generator(model, batch_size=2, compile=True, **options)
    streams = [engine.submit([1, 2, 1, 2], 120, temperature=0.0) for _ in range(2)]
    engine.run()
    expected = model.generate([[1, 2, 1, 2]], 120, temperature=0.0)[0]
    assert [[1, 2, 1, 2, *stream.ids] for stream in streams] == [expected] * 2


@needs_compiler
def test_tokens_are_chosen_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between compiled steps no other thread is woken; prompts and callers have all of them."""
    seen: list[int] = []
    draw = Chooser.extend

    def watched(self: Chooser, *rest: Any) -> None:
        seen.append(torch.get_num_threads())
        draw(self, *rest)

    monkeypatch.setattr(Chooser, "extend", watched)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for compile in (True, False):
            # a processor, so that tokens are chosen one by one
            tiny_gpt().generate(PROMPTS, max_new_tokens=2, compile=compile, processors=[TopP(0.9)])
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert set(seen[: len(seen) // 2]) == {1} and set(seen[len(seen) // 2 :]) == {3}
