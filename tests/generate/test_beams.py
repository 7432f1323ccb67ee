"""Beam search finds what transformers' finds."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt2.generate import Generator, NoRepeatNgram, RepetitionPenalty
from fastgpt2.generate.beams import BeamSearch
from fastgpt2.generate.inputs import Job
from fastgpt2.generate.jobs import plan, run
from fastgpt2.generate.options import Options
from fastgpt2.generate.processors import Processor
from fastgpt2.generate.sampling import Sampling
from fastgpt2.generate.slots import Slots
from fastgpt2.text import BytesTokenizer
from tests.test_model_transformers import theirs
from tests.tiny_gpt import tiny_gpt

STOP = 16
EDITS: list[tuple[list[Processor], dict[str, Any]]] = [
    ([], {}),
    ([RepetitionPenalty(1.3)], {"repetition_penalty": 1.3}),
    ([NoRepeatNgram(2)], {"no_repeat_ngram_size": 2}),
]


@pytest.mark.parametrize("edits", EDITS, ids=["plain", "repetition", "ngrams"])
@pytest.mark.parametrize("num_beams", [2, 5])
@pytest.mark.parametrize("early_stopping", [False, True])
@pytest.mark.parametrize("length_penalty", [1.0, -1.5, 3.0])
def test_the_same_texts_and_scores(
    edits: tuple[list[Processor], dict[str, Any]],
    num_beams: int,
    early_stopping: bool,
    length_penalty: float,
) -> None:
    model = tiny_gpt(block_size=32).eval()
    for prompt in ([1, 2, 3], [40]):
        expected = theirs(model).generate(
            torch.tensor([prompt]),
            max_new_tokens=9,
            num_beams=num_beams,
            num_return_sequences=num_beams,
            early_stopping=early_stopping,
            length_penalty=length_penalty,
            eos_token_id=STOP,
            pad_token_id=STOP,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
            **edits[1],
        )
        search = BeamSearch(
            Slots(model, num_beams, 32),
            num_beams,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
        )
        beams = search.search(
            prompt, 9, sampling=Sampling(0.0, None, edits[0]), stop=frozenset([STOP])
        )
        texts = [row[len(prompt) :].tolist() for row in expected.sequences]
        cut = [text[: text.index(STOP)] if STOP in text else text for text in texts]
        assert [beam.ids for beam in beams] == cut
        scores = expected.sequences_scores.tolist()
        assert [beam.score for beam in beams] == pytest.approx(scores, rel=1e-5, abs=1e-5)


def test_some_of_these_texts_stop() -> None:
    """Or the test above would not see how they are kept."""
    model = tiny_gpt(block_size=32).eval()
    beams = BeamSearch(Slots(model, 5, 32), 5).search(
        [1, 2, 3], 9, sampling=Sampling(0.0), stop=frozenset([STOP])
    )
    assert {beam.finish_reason for beam in beams} == {"stop", "length"}


def test_all_beams_are_all_texts() -> None:
    """With as many beams as there are texts, the best of them is found."""
    model = tiny_gpt(vocab_size=5).eval()
    beams = BeamSearch(Slots(model, 25, 16), 25).search([1], 2, sampling=Sampling(0.0))
    texts = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    totals = [sum(model.log_probs([[1, *text.tolist()]])[0]) / 2 for text in texts]
    best = max(range(25), key=totals.__getitem__)
    assert beams[0].ids == texts[best].tolist()
    assert beams[0].score == pytest.approx(totals[best], abs=1e-5)
    assert len({tuple(beam.ids) for beam in beams}) == 25


def test_beams_end_when_every_token_is_forbidden() -> None:
    model = tiny_gpt(vocab_size=5).eval()
    beams = BeamSearch(Slots(model, 2, 16), 2).search(
        [1], 9, sampling=Sampling(0.0, None, [NoRepeatNgram(1)])
    )
    assert {beam.finish_reason for beam in beams} == {"no token left"}
    assert all(sorted(beam.ids) == [0, 2, 3, 4] for beam in beams)
    assert sorted(model.generate([[1]], 9, num_beams=2, processors=[NoRepeatNgram(1)])[0]) == [
        *range(5)
    ]


def halve(ids: Tensor, logits: Tensor) -> Tensor:
    return logits.mul_(0.5)


@pytest.mark.parametrize("edit", [RepetitionPenalty(9), halve])
@pytest.mark.parametrize("window", ["slide", "stop"])
def test_log_probabilities_are_the_models(window: str, edit: Processor) -> None:
    """Whether a processor makes new logits or works in place."""
    model = tiny_gpt(block_size=32).eval()
    beams = BeamSearch(Slots(model, 3, 32), 3, window).search(
        [1, 2], 50 if window == "stop" else 9, sampling=Sampling(0.0, None, [edit])
    )
    for beam in beams:
        scores = model.log_probs([[1, 2, *beam.ids]])[0][1:]
        assert beam.log_probs == pytest.approx(scores, abs=1e-4)
        assert beam.finish_reason == ("window" if window == "stop" else "length")


@pytest.mark.parametrize("compiled", [False, True])
def test_the_commands_beams_are_compiled_as_its_other_texts(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Generator(tiny_gpt(vocab_size=257), BytesTokenizer())
    if compiled:
        monkeypatch.setattr(engine.slots, "compiled", object())
    asked = []

    def slots(*arguments: Any, compile: bool) -> Slots:
        asked.append(compile)
        return Slots(*arguments)

    monkeypatch.setattr("fastgpt2.generate.jobs.Slots", slots)
    options = Options().replaced({"num_beams": 2, "max_new_tokens": 2})
    assert len([*run(engine, plan([Job("a", options)] * 2, 0))]) == 2
    assert asked == [compiled]
