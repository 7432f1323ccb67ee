"""The decoding step: the logits of a full pass, in every form of the model."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastgpt2.generate.slots import Slots
from fastgpt2.generate.step import weights_of
from fastgpt2.kernels import linear_int8 as linear_int8_module
from fastgpt2.kernels import use_impl
from fastgpt2.kernels.linear_int8 import linear_int8
from fastgpt2.model import GPT
from tests.tiny_gpt import tiny_gpt

FORMS: dict[str, Callable[[], GPT]] = {
    "fp32": tiny_gpt,
    "int8": lambda: tiny_gpt().quantize("int8"),
    "no bias": lambda: tiny_gpt(bias=False),
    "erf": lambda: tiny_gpt(gelu="erf"),
    "padded vocabulary": lambda: tiny_gpt(vocab_size=61),
}


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cached", [1 << 19, 100, 1])
@pytest.mark.parametrize("N", [0, 1, 3])
def test_int8_products(
    N: int, cached: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All features at once, two at a time with one left, and one at a time."""
    monkeypatch.setattr(linear_int8_module, "_CACHED", cached)
    torch.manual_seed(0)
    x, integers = torch.randn(N, 48).to(dtype), torch.randint(-128, 128, (7, 48), dtype=torch.int8)
    scales = torch.rand(7)
    expected = x.float() @ integers.float().t() * scales
    out = linear_int8(x, integers, scales)
    assert out.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(out.float(), expected, atol=40 * tolerance, rtol=tolerance)


def test_int8_products_have_gradients_and_are_recorded_whole() -> None:
    torch.manual_seed(0)
    integers, scales = torch.randint(-128, 128, (7, 48), dtype=torch.int8), torch.rand(7)
    x = torch.randn(2, 48, requires_grad=True)
    linear_int8(x, integers, scales).sum().backward()  # type: ignore[no-untyped-call]
    expected = (integers.float() * scales[:, None]).sum(0).expand(2, 48)
    torch.testing.assert_close(x.grad, expected, atol=1e-4, rtol=1e-5)
    traced = torch.jit.trace(linear_int8, (x.detach(), integers, scales))  # type: ignore[no-untyped-call]
    more = torch.randn(5, 48)
    torch.testing.assert_close(
        traced(more, integers, scales), linear_int8(more, integers, scales), atol=1e-3, rtol=1e-5
    )
