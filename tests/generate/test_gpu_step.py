"""The decoding step of a GPU: exact, in few launches, without the host, and several tokens ahead.

Where a test's name says ``interpreted``, the step runs on Triton's interpreter; elsewhere PyTorch's
operators take the kernels' place, since what is tested stands around them.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt2.config import GPTConfig
from fastgpt2.generate import Generator, gpu_step, graph
from fastgpt2.generate import slots as slots_module
from fastgpt2.generate.gpu_step import gpu_greedy_after, gpu_logits_after, gpu_weights_of
from fastgpt2.generate.graph import Greedy
from fastgpt2.generate.slots import Slots
from fastgpt2.generate.step import plain_weights
from fastgpt2.kernels.backend import Impl
from fastgpt2.kernels.decode_linear import MAX_ROWS
from fastgpt2.model import GPT
from tests.generate.ahead_of_the_host import (
    PROMPTS,
    check_random_numbers_after_a_text,
    check_requests_that_come_and_go,
)
from tests.generate.played_graph import PlayedGraphs, Recorder
from tests.kernels.budget import DEVICE
from tests.tiny_gpt import tiny_gpt

FORMS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "int8": {},
    "no bias, erf, fp32 residual": {"bias": False, "gelu": "erf", "fp32_residual": True},
}


def _model(form: str = "fp32", **fields: Any) -> GPT:
    model = tiny_gpt(**(FORMS[form] | fields)).eval()
    return model.quantize("int8") if form == "int8" else model


def _texts(rows: int, length: int) -> list[list[int]]:
    return torch.randint(61, (rows, length), generator=torch.Generator().manual_seed(2)).tolist()


def _play_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_step, "resolve", lambda *_: Impl.TRITON)
    # the CPU's step does not know a model on a GPU
    monkeypatch.setattr(slots_module, "weights_of", lambda model: None)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> PlayedGraphs:
    """Models on the CPU take the GPU's step, on PyTorch's operators, and graphs are played."""
    _play_gpu(monkeypatch)
    played = PlayedGraphs()
    monkeypatch.setattr(graph, "capture", played)
    return played


@torch.no_grad()
@pytest.mark.parametrize(
    ("form", "B"),
    # of more rows than the kernel takes, the linear layers are the library's
    [*((form, B) for form in FORMS for B in (1, MAX_ROWS + 1)), ("fp32", 3), ("int8", 3)],
)
def test_an_interpreted_step_is_the_full_pass(form: str, B: int) -> None:
    model, idx = _model(form), torch.tensor(_texts(B, 6))
    weights = plain_weights(model)
    assert weights is not None
    cache = model.make_cache(B, 6)
    model.hidden_states(idx[:, :4], cache)
    # the rows end at different lengths: what the cache holds after them is of no account
    lengths = torch.tensor([4, 2, 3] * 3)[:B]
    kv = [layer.kv for layer in cache.layers]
    tokens = idx[torch.arange(B), lengths]
    logits = gpu_logits_after(weights, tokens, lengths, kv, "triton")
    full = model.logits(idx)[torch.arange(B), lengths]
    torch.testing.assert_close(logits, full, atol=2e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("form", "B"), [*((form, 1) for form in FORMS), ("int8", 3), ("fp32", MAX_ROWS + 1)]
)
def test_an_interpreted_greedy_step_chooses_the_largest_logit(form: str, B: int) -> None:
    model, idx = _model(form), torch.tensor(_texts(B, 6))
    weights = plain_weights(model)
    assert weights is not None
    cache = model.make_cache(B, 6)
    model.hidden_states(idx[:, :4], cache)
    lengths = torch.tensor([4, 2, 3] * 3)[:B]
    tokens, kv = idx[torch.arange(B), lengths], [layer.kv for layer in cache.layers]
    logits = gpu_logits_after(weights, tokens, lengths, kv, "triton")
    steps, recent = torch.ones(B, dtype=torch.int64), torch.zeros(2, 3, B, dtype=torch.float64)
    counted = lengths.clone()
    gpu_greedy_after(weights, tokens, counted, kv, steps, recent, "triton")
    best, chosen = logits.max(1)
    assert torch.equal(tokens, chosen) and torch.equal(counted, lengths + 1)
    assert torch.equal(recent[0, 1], chosen.double()) and (steps == 2).all()
    torch.testing.assert_close(recent[1, 1], best.double(), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_rows_are_fed_and_cut_as_without_a_graph(form: str, graphs: PlayedGraphs) -> None:
    model, texts = _model(form), _texts(3, 12)
    slots = Slots(model, 3, 16, compile=True)
    slots.feed(0, [text[:3] for text in texts])
    # neighbours alone, then all, one of them after a step back
    for t in range(3, 6):
        slots.feed(1, [texts[1][t : t + 1]])
    slots.feed(0, [texts[0][3:6], [0]])
    slots.cut([6, 6, 3])
    for t in range(3, 6):
        slots.feed(2, [texts[2][t : t + 1]])
    logits = slots.feed(0, [text[6:7] for text in texts])
    assert slots.lengths == slots.cache.lengths.tolist() == [7, 7, 7]
    full = model.logits(torch.tensor(texts)[:, :7])[:, -1]
    torch.testing.assert_close(logits, full, atol=2e-5, rtol=1e-5)
    assert graphs.captures == 1 and graphs.replays >= 7


WAYS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"seed": 3},
    {"seed": 3, "top_k": 9, "temperature": 0.7},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_same_text(way: dict[str, Any], graphs: PlayedGraphs) -> None:
    model = _model()
    for window in ("slide", "stop", "crop"):
        options = {"window": window, **way}
        expected = model.generate(PROMPTS, 25, **options)
        assert model.generate(PROMPTS, 25, compile=True, **options) == expected


@pytest.mark.parametrize("way", [{"temperature": 0.0}, {"top_k": 5}], ids=str)
def test_requests_come_and_go_and_stop_early(way: dict[str, Any], graphs: PlayedGraphs) -> None:
    check_requests_that_come_and_go(_model(), way)
    # the greedy choice is in a graph of its own
    assert graphs.captures == (2 if "temperature" in way else 1)


def test_the_host_looks_once_for_several_tokens(
    graphs: PlayedGraphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[torch.Size] = []
    real = Tensor.tolist

    def look(x: Tensor) -> Any:
        looks.append(x.shape)
        return real(x)

    monkeypatch.setattr(Tensor, "tolist", look)
    engine = Generator(_model(block_size=64), batch_size=2, compile=True)
    streams = [engine.submit([1, 2, i], 41, temperature=0.0) for i in range(2)]
    engine.run()
    assert [len(stream.ids) for stream in streams] == [41, 41]
    # the first token comes with the prompt; then eight at a time
    assert graphs.replays == 40
    assert sum(shape[:1] == (2,) and len(shape) == 3 for shape in looks) == 5
    assert len(looks) <= 5 + 4


@pytest.mark.parametrize("rows", [1, 3])
def test_nothing_is_launched_between_two_greedy_tokens(
    rows: int, graphs: PlayedGraphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots = Slots(_model(), 3, 30, compile=True)
    slots.feed(0, _texts(3, 2))
    tokens = [1, 2, 3][:rows]
    # the first captures, the second says again which rows are fed
    for _ in range(2):
        slots.ahead(tokens, 1, Greedy())
    assert slots.graph is not None
    monkeypatch.setattr(slots.graph, "_greedy_replay", lambda choice: lambda: None)
    launched = []
    for count in (1, 8):
        with Recorder() as recorder:
            slots.graph.ahead(tokens, count, Greedy())
        launched.append(recorder.names)
    assert launched[0] == launched[1]


@torch.no_grad()
def test_ids_without_a_text_are_not_chosen(graphs: PlayedGraphs) -> None:
    model = _model()
    logits = model.logits(torch.tensor([[1, 2]]))[0, -1]
    # the best id is none that the tokenizer knows
    known = max(1, int(logits.argmax()))
    slots = Slots(model, 2, 12, compile=True)
    found = {}
    for limit in (None, known):
        slots.cut([0, 0])
        slots.feed(0, [[1], [3]])
        ids, best = slots.ahead([2, 4], 1, Greedy(limit))
        found[limit] = ids[0][0]
        assert best[0][0] == pytest.approx(float(logits[:limit].max()), abs=1e-5)
    assert found == {None: int(logits.argmax()), known: int(logits[:known].argmax())}


def test_rows_that_are_not_fed_stay_as_they_are(graphs: PlayedGraphs) -> None:
    slots = Slots(_model(), 3, 30, compile=True)
    slots.feed(0, _texts(3, 4))
    kept = [layer.kv[:, 2, :, :4].clone() for layer in slots.cache.layers]
    for tokens, lengths in (([5, 6, 7], [6, 6, 6]), ([5, 6], [8, 8, 6])):
        slots.ahead(tokens, 2, Greedy())
        assert slots.cache.lengths.tolist() == slots.lengths == lengths
    for layer, before in zip(slots.cache.layers, kept, strict=True):
        assert torch.equal(layer.kv[:, 2, :, :4], before)


@pytest.mark.parametrize("way", [{"temperature": 0.0}, {"seed": 4}], ids=str)
def test_an_interrupt_between_two_steps_changes_no_text(
    way: dict[str, Any], graphs: PlayedGraphs
) -> None:
    model = _model()
    expected = Generator(model).submit([1, 2], 20, **way).wait().ids
    engine = Generator(model, batch_size=1, compile=True)
    stream = engine.submit([1, 2], 20, **way)
    engine.step()
    graphs.interrupt_after = graphs.replays + 3
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert stream.wait().ids == expected


def test_random_numbers_go_on_where_a_text_ended(graphs: PlayedGraphs) -> None:
    check_random_numbers_after_a_text(_model())


@pytest.mark.parametrize(
    "way",
    [{"log_probs": True}, {"processors": [lambda ids, logits: logits + ids[:, -1:] % 3]}],
    ids=["log_probs", "processors"],
)
def test_what_needs_the_host_takes_one_step_at_a_time(
    way: dict[str, Any], graphs: PlayedGraphs
) -> None:
    texts = []
    for compile in (False, True):
        engine = Generator(_model(), batch_size=2, compile=compile)
        streams = [engine.submit(p, 6, seed=2, **way) for p in PROMPTS[:2]]
        engine.run()
        texts.append([stream.ids for stream in streams])
    assert texts[0] == texts[1] and graphs.replays == 5


def test_other_weights_are_captured_anew(graphs: PlayedGraphs) -> None:
    model = _model()
    engine = Generator(model, batch_size=1, compile=True)
    engine.submit([1, 2], 4, temperature=0.0).wait()
    assert graphs.captures == 2
    # in place: the same memory
    with torch.no_grad():
        model.get_parameter("transformer.h.0.mlp.c_fc.weight").mul_(-3.0)
    expected = model.generate([[1, 2]], 8, 0.0)[0][2:]
    assert engine.submit([1, 2], 8, temperature=0.0).wait().ids == expected
    assert graphs.captures == 2
    model.quantize("int8")
    expected = model.generate([[1, 2]], 8, 0.0)[0][2:]
    assert engine.submit([1, 2], 8, temperature=0.0).wait().ids == expected
    assert graphs.captures == 4
    # a hook: the long way, until it is gone
    calls: list[int] = []
    handle = model.transformer.h[0].register_forward_hook(lambda *_: calls.append(1))
    engine.submit([1, 2], 4, temperature=0.0).wait()
    assert len(calls) == 4
    handle.remove()
    assert engine.submit([1, 2], 8, temperature=0.0).wait().ids == expected
    assert len(calls) == 4


def test_logits_that_are_not_finite_are_one_line(graphs: PlayedGraphs) -> None:
    model = _model()
    engine = Generator(model, batch_size=1, compile=True)
    stream = engine.submit([1, 2], 9, temperature=0.0)
    engine.step()
    with torch.no_grad():
        model.get_parameter("transformer.h.0.mlp.c_fc.weight").fill_(float("nan"))
    with pytest.raises(Exception, match="the logits are not finite") as raised:
        stream.wait()
    assert type(raised.value).__name__ == "UserError"


def test_heads_that_the_kernels_do_not_take_go_the_long_way(graphs: PlayedGraphs) -> None:
    model = _model(n_layer=1, n_head=1, n_embd=136)
    assert gpu_weights_of(model) is None
    with pytest.warns(UserWarning, match="generating without it"):
        model.generate([[1, 2]], 2, 0.0, compile=True)
    assert graphs.captures == 0


def test_what_fails_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    _play_gpu(monkeypatch)
    monkeypatch.setattr(graph, "capture", broken)
    lines: list[str] = []
    model = _model()
    engine = Generator(model, batch_size=1, compile=True, notify=lines.append)
    assert len(lines) == 1 and "\n" not in lines[0] and "generating without it" in lines[0]
    text = engine.submit([1, 2], 5, temperature=0.0).wait().ids
    assert text == model.generate([[1, 2]], 5, 0.0)[0][2:]


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize("form", ["fp32", "int8"])
def test_a_captured_graph_writes_the_same_text(form: str, rows: int) -> None:
    model = _model(form, block_size=128).to(DEVICE)
    texts = _texts(rows, 5)
    expected = model.generate(texts, 80, 0.0)
    assert model.generate(texts, 80, 0.0, compile=True) == expected
    sampled = model.generate(texts[:1], 80, seed=3, top_k=9)
    assert model.generate(texts[:1], 80, seed=3, top_k=9, compile=True) == sampled


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gpt2s_captured_graph_is_as_near_to_fp32_as_eager(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig.preset("gpt2")).to(DEVICE).eval()
    idx = torch.randint(50257, (2, 300), device=DEVICE).tolist()
    with torch.no_grad():
        gold = model.logits(torch.tensor(idx, device=DEVICE))[:, -1]
        model = model.to(dtype)
        errors = []
        for compile in (False, True):
            slots = Slots(model, 2, 320, compile=compile)
            slots.feed(0, [row[:-1] for row in idx])
            errors.append((slots.feed(0, [row[-1:] for row in idx]).float() - gold).norm())
    assert errors[1] <= 1.5 * errors[0]


@pytest.mark.gpu
@pytest.mark.parametrize("greedy", [False, True])
def test_steps_ahead_never_wait_for_the_gpu(greedy: bool) -> None:
    model = _model(block_size=64).to(DEVICE)
    slots = Slots(model, 2, 64, compile=True)
    slots.feed(0, [[1, 2], [3, 4]])
    assert slots.graph is not None

    def largest(logits: Tensor) -> tuple[Tensor, Tensor]:
        return logits.argmax(-1), logits.amax(-1)

    choose = Greedy() if greedy else largest
    tokens = slots.ahead([5, 6], 8, choose)[0][-1]
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchronizing") as seen:
            slots.ahead(tokens, 8, choose)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # the copy of all eight tokens to the host
    assert len(seen) == 1
