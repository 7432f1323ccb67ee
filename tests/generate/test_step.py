"""The decoding step: the logits of a full pass, in every form of the model, eager and compiled."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt2.compiler import compiler_obstacle
from fastgpt2.generate import Generator
from fastgpt2.generate.compiled import pays
from fastgpt2.generate.slots import Slots
from fastgpt2.generate.step import weights_of
from fastgpt2.kernels import use_impl
from fastgpt2.kernels.few_rows import few_rows_linear, words
from fastgpt2.model import GPT
from tests.tiny_gpt import tiny_gpt

FORMS: dict[str, Callable[[], GPT]] = {
    "fp32": tiny_gpt,
    "int8": lambda: tiny_gpt().quantize("int8"),
    "no bias": lambda: tiny_gpt(bias=False),
    "erf": lambda: tiny_gpt(gelu="erf"),
    "padded vocabulary": lambda: tiny_gpt(vocab_size=61),
}
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10]]
needs_compiler = pytest.mark.skipif(
    compiler_obstacle(torch.device("cpu")) is not None, reason="needs a C++ compiler"
)


def fed(slots: Slots, texts: list[list[int]]) -> Tensor:
    """The logits after the last token of each text, whose others are fed one by one."""
    slots.feed(0, [text[:2] for text in texts])
    for t in range(2, len(texts[0])):
        logits = slots.feed(0, [text[t : t + 1] for text in texts])
    return logits


def uncached(model: GPT, texts: list[list[int]]) -> Tensor:
    with torch.no_grad():
        return model.logits(torch.tensor(texts))[:, -1]


def texts_of(rows: int, length: int) -> list[list[int]]:
    return torch.randint(61, (rows, length), generator=torch.Generator().manual_seed(2)).tolist()


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_a_step_is_the_full_pass(form: str) -> None:
    model, texts = FORMS[form]().eval(), texts_of(3, 16)
    assert weights_of(model) is not None
    logits = fed(Slots(model, 3, 16), texts)
    torch.testing.assert_close(logits, uncached(model, texts), atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_a_step_keeps_the_dtype() -> None:
    for fp32_residual in (False, True):
        model, texts = tiny_gpt(fp32_residual=fp32_residual).eval().bfloat16(), texts_of(3, 9)
        logits = fed(Slots(model, 3, 16), texts)
        assert logits.dtype == torch.bfloat16
        gold = uncached(model.float(), texts)
        assert (logits.float() - gold).abs().max() < 0.05 * gold.abs().max()


@torch.no_grad()
def test_models_that_are_not_plain_take_the_long_way() -> None:
    model = tiny_gpt().eval()
    seen = []
    handle = model.transformer.h[0].register_forward_hook(lambda *_: seen.append(1))
    assert weights_of(model) is None
    fed(Slots(model, 1, 16), texts_of(1, 5))
    assert len(seen) == 4
    handle.remove()
    assert weights_of(model) is not None
    with use_impl("reference"):
        assert weights_of(model) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert weights_of(model) is None
    model.transformer.ln_f.double()
    assert weights_of(model) is None


@pytest.mark.parametrize("C", [48, 10])
@pytest.mark.parametrize("B", [1, 3])
def test_few_rows_are_a_product(B: int, C: int) -> None:
    torch.manual_seed(0)
    x, weight, scales = torch.randn(B, C), torch.randn(7, C), torch.rand(7)
    integers = torch.randint(-128, 128, (7, C), dtype=torch.int8)
    torch.testing.assert_close(few_rows_linear(x, weight), x @ weight.t())
    expected = x @ integers.float().t() * scales
    torch.testing.assert_close(few_rows_linear(x, words(integers), scales), expected)


def test_compiling_pays_for_long_texts_only() -> None:
    model = tiny_gpt()
    assert not pays(model, 1000) and pays(model, 10**12)


@pytest.fixture(scope="module")
def model() -> GPT:
    """One layer, for three rows: compiling takes seconds, so all share the program."""
    return tiny_gpt(n_layer=1, n_head=2, n_embd=16, block_size=200).eval()


class TestCompiled:
    """The same step as one program."""

    @needs_compiler
    def test_the_full_pass_whatever_the_lengths(self, model: GPT) -> None:
        # the trial of the first one compiles what all need
        assert Slots(model, 3, 20, compile=True).compiled is not None
        count = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        for size, length in ((5, 5), (63, 60), (200, 140)):
            slots, texts = Slots(model, 3, size, compile=True), texts_of(3, length)
            assert slots.compiled is not None
            logits = fed(slots, texts)
            torch.testing.assert_close(logits, uncached(model, texts), atol=2e-5, rtol=1e-5)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == count

    @needs_compiler
    @pytest.mark.parametrize("way", [{"temperature": 0.0}, {"seed": 3, "top_k": 9}])
    def test_the_same_text(self, model: GPT, way: dict[str, Any]) -> None:
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
    def test_int8(self) -> None:
        model = tiny_gpt(n_layer=1, n_head=2, n_embd=16, block_size=200).eval().quantize("int8")
        texts = texts_of(1, 70)
        logits = fed(Slots(model, 1, 70, compile=True), texts)
        torch.testing.assert_close(logits, uncached(model, texts), atol=2e-5, rtol=1e-5)

    @pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
    def test_without_a_compiler_it_goes_on(
        self, compiler: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CXX", compiler)
        if compiler == "false":

            def broken(*_: Any, **__: Any) -> Any:
                raise RuntimeError("fatal error:\nPython.h: No such file")

            monkeypatch.setattr(torch, "compile", broken)
        lines: list[str] = []
        model = tiny_gpt().eval()
        engine = Generator(model, batch_size=1, compile=True, notify=lines.append)
        assert len(lines[-1].splitlines()) == 1 and "generating without it" in lines[-1]
        text = engine.submit([1, 2], 5, temperature=0.0).wait().ids
        assert text == model.generate([[1, 2]], 5, temperature=0.0)[0][2:]
