"""What holds wherever tokens are chosen before the host looks at them: on a GPU, and in C++."""

from typing import Any

import torch

from fastgpt2.generate import Generator
from fastgpt2.model import GPT

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10]]


def check_requests_that_come_and_go(model: GPT, way: dict[str, Any]) -> None:
    """Requests enter, stop early and leave as they do without it."""
    texts: list[list[tuple[list[int], str | None]]] = []
    for compile in (False, True):
        engine = Generator(model, batch_size=2, compile=compile)
        streams = [
            engine.submit(prompt, n, stop=[7, 20, 33], seed=n + 50 * i, **way)
            for i, prompt in enumerate(PROMPTS)
            for n in (1, 9, 30)
        ]
        engine.run()
        texts.append([(stream.ids, stream.finish_reason) for stream in streams])
        assert "length" in {reason for _, reason in texts[-1]}
    assert texts[0] == texts[1]


def check_random_numbers_after_a_text(model: GPT) -> None:
    """They go on where the text ended, not where the last token was chosen."""
    states = []
    for compile in (False, True):
        numbers = torch.Generator().manual_seed(5)
        engine = Generator(model, batch_size=1, compile=compile)
        stream = engine.submit([1], 12, stop=range(0, 61, 6), generator=numbers).wait()
        assert stream.finish_reason == "stop"
        states.append((stream.ids, numbers.get_state()))
    assert states[0][0] == states[1][0] and torch.equal(states[0][1], states[1][1])
