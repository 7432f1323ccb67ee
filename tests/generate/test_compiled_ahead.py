"""Several tokens per call of the step in C++: chosen there as PyTorch's operators choose."""

from typing import Any

import pytest
import torch

from fastgpt2.errors import UserError
from fastgpt2.generate import Generator, TopP
from fastgpt2.generate.compiled import CompiledStep, Draw
from fastgpt2.generate.graph import AHEAD
from fastgpt2.generate.sampling import Sampling, draw
from fastgpt2.generate.slots import Slots
from tests.generate.ahead_of_the_host import (
    PROMPTS,
    check_random_numbers_after_a_text,
    check_requests_that_come_and_go,
)
from tests.generate.compiled_step import compiled_slots, needs_compiler
from tests.tiny_gpt import tiny_gpt

pytestmark = [pytest.mark.usefixtures("libraries"), needs_compiler]

WAYS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"seed": 3},
    {"seed": 3, "temperature": 0.7, "top_k": 9},
    {"seed": 4, "temperature": 30.0, "top_k": 1},
    {"seed": 4, "temperature": 1e-46},
    {"seed": 5, "temperature": 1e30, "top_k": 200},
]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each call was asked for."""
    counts: list[int] = []
    plain = CompiledStep.ahead

    def counted(self: CompiledStep, *rest: Any) -> Any:
        counts.append(rest[3])
        return plain(self, *rest)

    monkeypatch.setattr(CompiledStep, "ahead", counted)
    return counts


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("form", ["fp32", "bf16", "int8"])
def test_the_same_text(form: str, way: dict[str, Any], calls: list[int]) -> None:
    model = tiny_gpt(block_size=32).eval()
    if form == "bf16":
        # the two ways round differently within the model: only the choice is compared
        model = model.bfloat16()
        slow = {"processors": [TopP(1.0)], **way}
        assert model.generate(PROMPTS, 25, compile=True, **way) == model.generate(
            PROMPTS, 25, compile=True, **slow
        )
    else:
        model = model.quantize("int8") if form == "int8" else model
        for window in ("slide", "stop", "crop"):
            options = {"window": window, **way}
            expected = model.generate(PROMPTS, 40, **options)
            assert model.generate(PROMPTS, 40, compile=True, **options) == expected
    assert max(calls) == AHEAD


def test_the_host_looks_once_for_several_tokens(calls: list[int]) -> None:
    engine = Generator(tiny_gpt(block_size=64), batch_size=2, compile=True)
    streams = [engine.submit([1, 2, i], 41, temperature=0.0) for i in range(2)]
    engine.run()
    assert [len(stream.ids) for stream in streams] == [41, 41]
    # the first token comes with the prompt
    assert calls == [AHEAD] * 5


@pytest.mark.parametrize("way", [{"temperature": 0.0}, {"top_k": 5}], ids=str)
def test_requests_come_and_go_and_stop_early(way: dict[str, Any], calls: list[int]) -> None:
    check_requests_that_come_and_go(tiny_gpt(), way)
    assert calls


def test_random_numbers_go_on_where_a_text_ended() -> None:
    check_random_numbers_after_a_text(tiny_gpt())


def test_a_row_alone_fails_alone() -> None:
    """The token that leads to NaN is one row's."""
    model = tiny_gpt(n_layer=1).eval()
    good = model.generate([[1, 2]], 12, 0.0)[0][2:]
    bad = next(id_ for id_ in range(61) if id_ not in (1, 2, *good))
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        model.transformer.wte.weight[bad] = float("nan")
    engine = Generator(model, batch_size=2, compile=True)
    streams = [engine.submit([first, 2], 12, temperature=0.0) for first in (1, 3)]
    engine.step()
    # as if the second row had chosen it
    engine._rows[1].ids[-1] = bad
    with pytest.raises(UserError, match="not finite"):
        streams[1].wait()
    assert streams[0].wait().ids == good


def test_one_logit_that_is_not_finite_is_seen() -> None:
    model = tiny_gpt().eval()
    engine = Generator(model, batch_size=1, compile=True)
    stream = engine.submit([1, 2], 12, temperature=0.0)
    engine.step()
    with torch.no_grad():
        model.transformer.wte.weight[next(i for i in range(61) if i not in stream.ids)] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        stream.wait()


def test_the_text_goes_on_after_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interrupt comes when the tokens have been chosen and the rows not grown yet."""

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    model = tiny_gpt().eval()
    engine = Generator(model, batch_size=1, compile=True)
    stream = engine.submit([1, 2], 12, seed=1)
    engine.step()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Slots, "_grow", interrupted)
        engine.step()
    assert stream.wait().ids == model.generate([[1, 2]], 12, seed=1)[0][2:]


def test_what_needs_the_host_takes_one_step_at_a_time(calls: list[int]) -> None:
    for way in ({"log_probs": True}, {"processors": [lambda ids, logits: logits]}):
        engine = Generator(tiny_gpt(), batch_size=2, compile=True)
        engine.submit([1, 2], 6, seed=2, **way).wait()
    assert not calls


def test_rows_with_many_random_numbers_take_one_step_at_a_time() -> None:
    slots = compiled_slots(tiny_gpt(), 2, 8)
    step = slots.compiled
    assert step is not None
    assert step.runs_ahead(32) and not step.runs_ahead(33)
    wide = compiled_slots(tiny_gpt(vocab_size=40_000), 2, 8).compiled
    assert wide is not None
    assert wide.runs_ahead(1) and not wide.runs_ahead(2)


class TestChoice:
    """One step of a model whose logits are known."""

    @pytest.fixture
    def slots(self) -> Slots:
        return compiled_slots(tiny_gpt(block_size=64).eval(), 3, 64)

    def _logits(self, slots: Slots) -> torch.Tensor:
        slots.cut([0, 0, 0])
        slots.feed(0, PROMPTS[:1] * 3)
        logits = slots.feed(0, [[11], [12], [13]])
        slots.cut([3, 3, 3])
        return logits

    @pytest.mark.parametrize("known", [1, 5, 61, 70, None])
    def test_known_tokens_only(self, slots: Slots, known: int | None) -> None:
        logits = self._logits(slots)
        tokens, best = slots.compiled_ahead([11, 12, 13], 1, known, None)
        values, ids = logits[:, :known].max(dim=-1)
        assert tokens == [ids.tolist()] and best == [values.tolist()]
        assert slots.lengths == slots.cache.lengths.tolist() == [4, 4, 4]

    def test_equal_logits(self, slots: Slots) -> None:
        slots.model.transformer.ln_f.weight.data.zero_()
        slots.model.transformer.ln_f.bias.data.zero_()
        assert not self._logits(slots).any()
        assert slots.compiled_ahead([11, 12, 13], 2, None, None)[0] == [[0, 0, 0]] * 2
        assert slots.lengths == slots.cache.lengths.tolist() == [5, 5, 5]

    def test_a_choice_sees_logits_in_the_models_dtype(self) -> None:
        """All logits are near 10: several tokens are the best ones together after the rounding."""
        model = tiny_gpt(n_layer=1).bfloat16().eval()
        model.transformer.ln_f.bias.data[0] = 10.0
        model.transformer.wte.weight.data[:, 0] = 1.0
        slots = compiled_slots(model, 1, 8)
        found, expected = [], []
        for id_ in range(60):
            slots.cut([0])
            slots.feed(0, [[1, 2]])
            expected.append([slots.feed(0, [[id_]]).argmax(dim=-1).tolist()])
            slots.cut([2])
            found.append(slots.compiled_ahead([id_], 1, None, None)[0])
        assert found == expected

    @pytest.mark.parametrize("top_k", [None, 1, 3, 60, 61, 99])
    def test_the_draw_is_pytorchs(self, slots: Slots, top_k: int | None) -> None:
        logits = self._logits(slots)
        processed = Sampling(0.8, top_k).process(logits, logits)
        for seed in range(40):
            numbers = torch.Generator().manual_seed(seed)
            expected = draw(processed, numbers)[:, 0].tolist()
            times = torch.empty(1, 3, 61)
            times.view(3, 61).exponential_(1.0, generator=numbers.manual_seed(seed))
            tokens, _ = slots.compiled_ahead([11, 12, 13], 1, None, Draw(0.8, top_k, times))
            assert tokens == [expected]
            slots.cut([3, 3, 3])

    def test_a_full_row_is_refused(self, slots: Slots) -> None:
        slots.feed(0, [[1] * 60] * 3)
        with pytest.raises(IndexError):
            slots.compiled_ahead([1, 2, 3], 5, None, None)
        assert slots.lengths == [60, 60, 60]
