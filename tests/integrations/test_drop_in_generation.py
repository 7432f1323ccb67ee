"""``generate`` in its modes: the same tokens and scores as transformers' class."""

from typing import Any

import pytest
import torch

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
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "dynamic cache": {"cache_implementation": "dynamic"},
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
    _, assistant = pair(n_layer=1)
    ids = tokens(1, 6)
    expected = theirs.generate(ids, max_new_tokens=10)
    assert torch.equal(ours.generate(ids, max_new_tokens=10, assistant_model=assistant), expected)


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
