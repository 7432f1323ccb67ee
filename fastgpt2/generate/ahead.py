"""Several tokens of every row, chosen on the device before the host looks at them.

Waiting for each token would leave the GPU idle while the host reads it, decides and launches; on a
CPU, the host's work for a token of a small model takes as long as the model's. The host decides
afterwards whether a text ends: it drops the tokens after the end and sets the row's random numbers
back to that place.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastgpt2.generate.compiled import Draw
from fastgpt2.generate.graph import Choice, Greedy
from fastgpt2.generate.request import Request
from fastgpt2.generate.sampling import draw
from fastgpt2.generate.slots import Slots


def may_run_ahead(requests: Sequence[Request]) -> bool:
    """Whether the next tokens of these rows can be chosen without the host.

    They can where all choose alike, by temperature and top_k alone, and each row has random numbers
    of its own.
    """
    sampling = requests[0].sampling
    own_numbers = len({id(request.generator) for request in requests}) == len(requests)
    return (
        not sampling.processors
        and all(request.sampling.key == sampling.key for request in requests)
        and (sampling.is_greedy or own_numbers)
        and not any(request.log_probs for request in requests)
    )


class Ahead:
    """The next ``count`` tokens of the first rows of a cache.

    Args:
        slots: the cache, with a captured step.
        requests: the rows' requests, for which ``may_run_ahead`` is true.
        tokens: the newest token of each row, which the cache does not hold yet.
        count: tokens to choose, 1 to ``AHEAD``; each row has room for as many.
        process: turns the model's logits (rows, V) into those to choose from.
        known: what ``process`` forbids: the ids from here on; None for none.

    Attributes:
        tokens: ``count`` lists with a token per row.
        best: ``count`` lists with the largest logit per row among those that it chose from.
    """

    def __init__(
        self,
        slots: Slots,
        requests: Sequence[Request],
        tokens: list[int],
        count: int,
        process: Callable[[Tensor], Tensor],
        known: int | None,
    ) -> None:
        self._requests, self._process = requests, process
        self._states: list[list[Tensor]] = []
        try:
            if slots.compiled is None:
                is_greedy = requests[0].sampling.is_greedy
                choice: Choice = Greedy(known) if is_greedy else self._choose
                self.tokens, self.best = slots.ahead(tokens, count, choice)
            else:
                way = self._draw(count, slots.model.config.vocab_size)
                self.tokens, self.best = slots.compiled_ahead(tokens, count, known, way)
        except BaseException:
            # after an interrupt, the rows go on as if there had been none
            for row in range(len(requests)):
                self.rewind(row, 0)
            raise

    def _choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        processed = self._process(logits)
        generators = [request.generator for request in self._requests]
        self._states.append([generator.get_state() for generator in generators])
        rows = zip(processed[:, None].unbind(), generators, strict=True)
        tokens = torch.cat([draw(row, generator)[:, 0] for row, generator in rows])
        return tokens, processed.amax(dim=-1)

    def _draw(self, count: int, V: int) -> Draw | None:
        """How the compiled step draws, with the random numbers of ``sampling.draw``."""
        sampling = self._requests[0].sampling
        if sampling.is_greedy:
            return None
        generators = [request.generator for request in self._requests]
        times = torch.empty(count, len(generators), V)
        for of_step in times:
            self._states.append([generator.get_state() for generator in generators])
            for row, generator in zip(of_step, generators, strict=True):
                row.exponential_(1.0, generator=generator)
        return Draw(sampling.temperature, sampling.top_k, times)

    def rewind(self, row: int, used: int) -> None:
        """Set the row's random numbers back to where they were after its first ``used`` tokens."""
        if used < len(self._states):
            self._requests[row].generator.set_state(self._states[used][row])
