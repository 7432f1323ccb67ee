"""``generate`` in its modes: the same tokens and scores as transformers' class."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tests.integrations.tiny_hf import PAD, assert_close, padding, pair, tokens

LEFT_PADDED = tokens(3, 6).masked_fill(padding(6, (3, 6), (0, 6), (5, 6)) == 0, PAD)

MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy without cache": {"use_cache": False},
    "sampling": {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 0.8},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "warpers": {"do_sample": True, "min_p": 0.01, "typical_p": 0.9, "epsilon_cutoff": 1e-3},
    "guidance": {"guidance_scale": 1.5},
    "beams that stop early": {"num_beams": 3, "early_stopping": True, "length_penalty": 0.5},
    "beams without cache": {"num_beams": 2, "use_cache": False},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "static cache, beams": {
        "cache_implementation": "static",
        "disable_compile": True,
        "num_beams": 2,
    },
    "dynamic cache": {"cache_implementation": "dynamic"},
    "prompt in chunks": {"prefill_chunk_size": 4},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "left-padded"])
def test_generates_what_theirs_generates(mode: dict[str, Any], padded: bool) -> None:
    theirs, ours = pair()
    ids = LEFT_PADDED if padded else tokens(3, 6)
    if "prompt_lookup_num_tokens" in mode:
        ids = ids[1:2]
    mask = (ids != PAD).long()
    results = []
    for model in (theirs, ours):
        torch.manual_seed(0)
        result = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=8,
            return_dict_in_generate=True,
            output_scores=True,
            **mode,
        )
        results.append(result)
    assert torch.equal(results[1].sequences, results[0].sequences)
    finite = [s.masked_fill(s.isinf(), 0.0) for s in results[0].scores]
    assert_close([s.masked_fill(s.isinf(), 0.0) for s in results[1].scores], finite)


def test_assisted_generation_is_greedy_generation() -> None:
    theirs, ours = pair()
    their_assistant, assistant = pair(n_layer=1)
    ids = tokens(1, 6)
    expected = theirs.generate(ids, max_new_tokens=10)
    assert torch.equal(ours.generate(ids, max_new_tokens=10, assistant_model=assistant), expected)
    sampled = []
    for model, small in ((theirs, their_assistant), (ours, assistant)):
        torch.manual_seed(0)
        sampled.append(
            model.generate(ids, max_new_tokens=10, assistant_model=small, do_sample=True)
        )
    assert torch.equal(sampled[1], sampled[0])


@pytest.mark.parametrize("mode", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_everything_that_can_be_returned(mode: dict[str, Any]) -> None:
    results = []
    for model in pair():
        # only eager attention has probabilities to return
        model.set_attn_implementation("eager")
        results.append(
            model.generate(
                tokens(2, 6),
                max_new_tokens=4,
                return_dict_in_generate=True,
                output_logits=True,
                output_hidden_states=True,
                output_attentions=True,
                **mode,
            )
        )
    theirs, ours = results
    assert ours.keys() == theirs.keys()
    for name in ("sequences", "logits", "hidden_states", "attentions"):
        assert_close(ours[name], theirs[name])


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_conversation_continues_from_its_cache(kind: str) -> None:
    first, second = tokens(1, 6), tokens(1, 3, seed=2)
    texts = []
    for model in pair():
        options: dict[str, Any] = {"config": model.config}
        if kind == "static":
            options |= {"max_cache_len": 40}
        cache = (transformers.StaticCache if kind == "static" else transformers.DynamicCache)(
            **options
        )
        options = {"past_key_values": cache, "disable_compile": True, "max_new_tokens": 4}
        said = model.generate(first, **options)
        texts.append(model.generate(torch.cat([said, second], dim=1), **options))
        whole = model.generate(torch.cat([said, second], dim=1), max_new_tokens=4)
        assert torch.equal(texts[-1], whole)
    assert torch.equal(texts[1], texts[0])


def test_streamers_and_stopping_criteria() -> None:
    class Streamer:
        def __init__(self) -> None:
            self.got: list[int] = []
            self.ended = False

        def put(self, value: Tensor) -> None:
            self.got += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    def enough(ids: Tensor, _scores: Any, **_: Any) -> Tensor:
        return torch.full((ids.shape[0],), ids.shape[1] >= 9)

    results = []
    for model in pair():
        streamer = Streamer()
        out = model.generate(
            tokens(1, 6), max_new_tokens=8, streamer=streamer, stopping_criteria=[enough]
        )
        assert streamer.ended and streamer.got == out[0].tolist() and out.shape[1] <= 9
        results.append(out)
    assert torch.equal(results[1], results[0])


def test_a_left_padded_batch_is_its_rows_one_by_one() -> None:
    _, ours = pair()
    mask = (LEFT_PADDED != PAD).long()
    together = ours.generate(LEFT_PADDED, attention_mask=mask, max_new_tokens=6)[:, 6:]
    for row, kept, expected in zip(LEFT_PADDED, mask.bool(), together, strict=True):
        prompt = row[kept][None]
        alone = ours.generate(prompt, max_new_tokens=6)[0, prompt.shape[1] :]
        assert torch.equal(alone, expected[: len(alone)])


def test_from_embeddings_and_up_to_the_last_position() -> None:
    theirs, ours = pair()
    embeds = torch.randn(2, 4, 24, generator=torch.Generator().manual_seed(3))
    expected, got = (m.generate(inputs_embeds=embeds, max_new_tokens=5) for m in (theirs, ours))
    assert torch.equal(got, expected)
    expected, got = (m.generate(tokens(1, 6), max_length=48) for m in (theirs, ours))
    assert torch.equal(got, expected)
