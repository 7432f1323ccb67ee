"""A request that fails fails alone, and a pass that is cut short leaves the caches usable."""

from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastgpt2.errors import UserError
from fastgpt2.generate import Generator, TopP
from fastgpt2.generate.request import Stream
from fastgpt2.model import GPT
from tests.tiny_gpt import tiny_gpt

PROMPTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9], [4, 5]]
# what the second request gets
FAILING = 1


class Fails:
    """A processor that raises when a text of its row's has three tokens more than the prompt."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        if ids.shape[1] >= self.length and bool((ids[:, 0] == PROMPTS[FAILING][0]).any()):
            raise ValueError("this request")
        return logits


def submit_all(generator: Generator, processor: Any) -> list[Stream]:
    """The prompts but the last, all with the same processor: they share its calls."""
    return [
        generator.submit(prompt, 8, seed=i, processors=[processor])
        for i, prompt in enumerate(PROMPTS[:3])
    ]


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("aid", ["none", "draft", "lookup"])
def test_the_other_streams_go_on(batch_size: int, aid: str) -> None:
    model = tiny_gpt(block_size=32)
    aids: dict[str, dict[str, Any]] = {
        "none": {},
        "draft": {"draft": tiny_gpt(1, block_size=32)},
        "lookup": {"prompt_lookup": 2},
    }
    plain: Any = lambda ids, logits: logits  # noqa: E731
    expected = submit_all(Generator(model, batch_size=1, **aids[aid]), plain)
    generator = Generator(model, batch_size=batch_size, **aids[aid])
    streams = submit_all(generator, Fails(5))
    # one after another, so that lengths differ and calls are shared only by some
    with pytest.raises(ValueError, match="this request"):
        generator.run()
    for i, (stream, other) in enumerate(zip(streams, expected, strict=True)):
        other.wait()
        if i == FAILING:
            assert stream.finish_reason == "error" and stream.ids == other.ids[: len(stream.ids)]
            with pytest.raises(ValueError, match="this request"):
                stream.wait()
            with pytest.raises(ValueError, match="this request"):
                list(stream)
        else:
            assert (stream.ids, stream.finish_reason) == (other.ids, "length")


def test_of_rows_that_share_a_call_only_one_fails() -> None:
    generator = Generator(tiny_gpt(), batch_size=2)
    processor = Fails(3)
    first, second = (generator.submit(p, 4, seed=1, processors=[processor]) for p in ([4], [5]))
    with pytest.raises(ValueError, match="this request"):
        generator.run()
    assert (first.finish_reason, second.finish_reason) == ("error", "length")
    assert second.ids == Generator(tiny_gpt()).submit([5], 4, seed=1).wait().ids


@pytest.mark.parametrize("lookup", [0, 2])
@pytest.mark.parametrize("place", ["_chooser.extend", "slots.copy", "slots._count"])
def test_a_pass_that_is_interrupted_can_be_repeated(
    place: str, lookup: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before tokens are chosen, a row is moved, or the new lengths are counted."""
    model = tiny_gpt(2, block_size=32)
    generator = Generator(model, batch_size=2, prompt_lookup=lookup)
    lengths = (9, 5, 9, 7)
    streams = [
        generator.submit(p, n, temperature=0.0) for p, n in zip(PROMPTS, lengths, strict=True)
    ]
    name, function = place.split(".")
    part = getattr(generator, name)
    inner, calls = getattr(part, function), [0]

    def interrupted(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] % 3 == 1:
            calls.append(0)
            raise KeyboardInterrupt
        return inner(*arguments)

    monkeypatch.setattr(part, function, interrupted)
    while any(stream.finish_reason is None for stream in streams):
        with suppress(KeyboardInterrupt):
            generator.step()
    assert len(calls) > 1
    assert [[*p, *s.ids] for p, s in zip(PROMPTS, streams, strict=True)] == [
        model.generate([p], n, temperature=0.0)[0] for p, n in zip(PROMPTS, lengths, strict=True)
    ]


def test_modules_keep_their_modes() -> None:
    """A module that is kept in evaluation mode while the others train stays so."""
    model = tiny_gpt(dropout=0.5).train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    model.generate([[1, 2, 3]], 3)
    model.log_probs([[1, 2, 3]])
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"draft": True}])
def test_a_model_in_training_mode_generates_without_dropout(options: dict[str, Any]) -> None:
    model = tiny_gpt(dropout=0.5).train()
    draft = tiny_gpt(1, dropout=0.5).train()
    if "draft" in options:
        options = {"draft": draft, "temperature": 0.0}
    text = model.generate([[1, 2, 3]], 9, **options)
    assert model.training and draft.training and draft.transformer.h[0].training
    model.eval(), draft.eval()
    assert text == model.generate([[1, 2, 3]], 9, **options)


HALF: Any = np.float32(0.5)
SCALARS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "integers": (
        {"seed": np.int64(3), "top_k": np.int32(5), "temperature": np.float32(0.5)},
        {"seed": 3, "top_k": 5, "temperature": 0.5},
    ),
    "tensors": (
        {"seed": torch.tensor(3), "top_k": torch.tensor(5), "temperature": torch.tensor(0.5)},
        {"seed": 3, "top_k": 5, "temperature": 0.5},
    ),
    "stops": ({"seed": 3, "stop": torch.tensor([28, 0])}, {"seed": 3, "stop": [28, 0]}),
    "a stop": ({"seed": 3, "stop": np.int64(28)}, {"seed": 3, "stop": 28}),
    "beams": ({"num_beams": np.int64(3)}, {"num_beams": 3}),
    "processors": (
        {"seed": 3, "processors": (TopP(HALF),)},
        {"seed": 3, "processors": [TopP(0.5)]},
    ),
}


@pytest.mark.parametrize(("given", "plain"), SCALARS.values(), ids=SCALARS)
def test_numbers_of_numpy_and_torch(given: dict[str, Any], plain: dict[str, Any]) -> None:
    model = tiny_gpt()
    numbers: list[Any] = [np.int64(6), torch.tensor(6)]
    for n in numbers:
        assert model.generate([[1]], n, **given) == model.generate([[1]], 6, **plain)


def test_numbers_of_other_calls() -> None:
    model = tiny_gpt()
    four: Any = np.int64(4)
    assert model.log_probs([[1, 2]], batch_size=four) == model.log_probs([[1, 2]])
    Generator(model, draft=tiny_gpt(1), proposals=four)
    mask: Any = np.array([[0, 1, 1]])
    found = model.generate(torch.tensor([[0, 1, 2]]), 3, attention_mask=mask, seed=1)
    assert found[0, 1:].tolist() == model.generate([[1, 2]], 3, seed=1)[0]


def test_a_model_in_another_dtype_needs_another_generator() -> None:
    """Or what is computed would not fit into the cache, and a compiled step writes past its end."""
    model = tiny_gpt().bfloat16()
    generator = Generator(model)
    assert len(generator.submit([1], 3).wait().ids) == 3
    model.float()
    with pytest.raises(UserError, match="computes in float32 now, in bfloat16 when this was made"):
        generator.submit([1], 3).wait()
    model.bfloat16()
    generator.run()


@pytest.mark.parametrize("aid", [{}, {"draft": tiny_gpt(1)}], ids=["plain", "draft"])
def test_inference_mode_may_end_meanwhile(aid: dict[str, Any]) -> None:
    model = tiny_gpt()
    with torch.inference_mode():
        generator = Generator(model, **aid)
        stream = generator.submit([1, 2], 5, temperature=0.0)
        generator.step()
    assert [1, 2, *stream.wait().ids] == model.generate([[1, 2]], 5, temperature=0.0)[0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.generate([[1]], 1, processors=TopP(0.5)), "processors: expected a list"),
        (lambda m: m.generate([[1]], 1, processors=None), "processors: expected a list"),
        (
            lambda m: m.generate([[1]], 1, processors=[lambda ids, logits: None]),
            r"processors: expected logits of shape \(1, 61\), got None",
        ),
        (
            lambda m: m.generate([[1]], 1, num_beams=2, processors=[lambda ids, logits: None]),
            r"processors: expected logits of shape \(1, 61\), got None",
        ),
        (
            lambda m: m.generate([[1]], 1, processors=[lambda ids, logits: logits > 0]),
            "processors: expected logits in floating point, got bool",
        ),
        (lambda m: m.generate([[1]], 1, num_beams=2, window="wrap"), "window must be one of slide"),
        (lambda m: m.generate([[1]], 1, length_penalty=2.0), "are for beams; give num_beams"),
        (lambda m: m.generate([[1]], 1, num_beams=2, early_stopping="never"), "true or false"),
        (lambda m: m.generate([[1]], 1, draft="gpt2"), "draft: expected a GPT, got 'gpt2'"),
        (lambda m: m.generate(torch.ones(1, 2).byte(), 1), r"int32 or int64 ids .* got uint8"),
        (lambda m: m.generate(torch.ones(1, 2).bool(), 1), r"int32 or int64 ids .* got bool"),
        (lambda m: m.generate([[1]], True), "max_new_tokens must be an integer"),
        (lambda m: m.generate(5, 1), "prompts: expected lists of token ids, got 5"),
        (lambda m: m.log_probs(None), "prompts: expected lists of token ids, got None"),
        (lambda m: m.generate([[1]], 1, generator=5), "expected a torch.Generator, got 5"),
        (lambda m: Generator(m).submit([1], generator=HALF), "expected a torch.Generator, got"),
        (
            lambda m: Generator(m, size=4).submit([1, 2], 4),
            "size: rows hold 4 tokens, this text needs 5",
        ),
    ],
)
def test_mistakes_are_named(call: Any, message: str) -> None:
    model: GPT = tiny_gpt()
    with pytest.raises(UserError, match=message):
        call(model)
