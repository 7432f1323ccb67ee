"""From logits to the next token: temperature, processors, and the draw."""

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from fastgpt2.errors import UserError
from fastgpt2.generate.processors import Processor, Temperature, TopK, plain


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from its logits.

    Args:
        temperature: below 1 sharper, above 1 flatter; 0 is greedy.
        top_k: only the k most likely tokens can be drawn; None means all.
        processors: callables ``(ids, logits) -> logits``; those with ``warps`` run after
            temperature and top_k, and only if a token is drawn.

    Raises:
        UserError: the temperature is negative or not finite, top_k is below 1, or the processors
            are not a list of callables.
    """

    temperature: float = 1.0
    top_k: int | None = None
    processors: Sequence[Processor] = ()
    # the two groups of processors, in their order
    edits: tuple[Processor, ...] = field(init=False, repr=False)
    warps: tuple[Processor, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        several = isinstance(self.processors, Iterable)
        if not several:
            raise UserError(f"processors: expected a list of them, got {self.processors!r:.80}")
        object.__setattr__(self, "temperature", plain(self.temperature))
        object.__setattr__(self, "processors", tuple(self.processors))
        warps: list[Processor] = [Temperature(self.temperature)]
        if self.top_k is not None:
            warps.append(TopK(self.top_k))
        edits: list[Processor] = []
        for processor in self.processors:
            if not callable(processor):
                raise UserError(f"processors: expected callables, got {processor!r:.80}")
            (warps if getattr(processor, "warps", False) else edits).append(processor)
        object.__setattr__(self, "edits", tuple(edits))
        object.__setattr__(self, "warps", () if self.is_greedy else tuple(warps))

    @property
    def is_greedy(self) -> bool:
        """Whether the best token is taken."""
        return self.temperature == 0

    @property
    def reads_ids(self) -> bool:
        """Whether a processor may read the tokens so far."""
        return any(getattr(p, "reads_ids", True) for p in (*self.edits, *self.warps))

    @cached_property
    def key(self) -> tuple[Hashable, ...]:
        """Equal keys mean the same choice, so that rows with equal keys can share a call."""
        processors = (p if _is_hashable(p) else id(p) for p in self.processors)
        return self.temperature, self.top_k, *processors

    def process(self, ids: Tensor, logits: Tensor) -> Tensor:
        """The logits that the choice is made from.

        Args:
            ids: (B, T), the tokens so far.
            logits: (B, V).

        Returns:
            (B, V) fp32.

        Raises:
            UserError: a processor returns anything else.
        """
        # a processor may change what it is given, but the model's logits are still needed
        logits = logits.to(torch.float32, copy=bool(self.processors))
        for processor in (*self.edits, *self.warps):
            found = processor(ids, logits)
            if not isinstance(found, Tensor) or found.shape != logits.shape:
                got = tuple(found.shape) if isinstance(found, Tensor) else f"{found!r:.80}"
                raise UserError(
                    f"processors: expected logits of shape {tuple(logits.shape)}, got {got}"
                )
            if not found.is_floating_point():
                dtype = str(found.dtype).removeprefix("torch.")
                raise UserError(f"processors: expected logits in floating point, got {dtype}")
            logits = found
        return logits


def _is_hashable(processor: Processor) -> bool:
    # a dataclass has a ``__hash__`` even if its fields are not hashable
    try:
        hash(processor)
    except TypeError:
        return False
    return True


def allows_some(logits: Tensor) -> list[bool]:
    """Whether some token may follow, for each row of processed logits (B, V).

    Raises:
        UserError: logits are NaN or infinite.
    """
    return may_follow(logits.amax(dim=-1).tolist())


def may_follow(best: Sequence[float]) -> list[bool]:
    """``allows_some``, given the largest processed logit of each row."""
    if any(math.isnan(value) or value == math.inf for value in best):
        raise UserError("the logits are not finite: damaged weights, or too large for fp16")
    return [value > -math.inf for value in best]


def draw(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """(B, V) processed logits -> (B, 1) tokens, drawn from their softmax in fp32.

    A row in which every token is forbidden gives any token. The token with the least arrival time
    of exponential clocks that run at the rates p is distributed as p: ``torch.multinomial`` draws
    the same tokens from the same random numbers, but waits for the GPU.
    """
    logits = logits.float()
    hopeless = logits.amax(dim=-1, keepdim=True) == -torch.inf
    probs = torch.softmax(logits.masked_fill(hopeless, 0.0), dim=-1)
    times = torch.empty_like(probs).exponential_(1.0, generator=generator)
    return (probs / times).argmax(dim=-1, keepdim=True)


def log_probs_of(logits: Tensor, chosen: Sequence[int | None]) -> list[float]:
    """The log-probability of the token chosen in each row of logits (B, V); of token 0 for None."""
    ids = torch.tensor([id_ or 0 for id_ in chosen], device=logits.device)
    log_probs = logits.float().log_softmax(dim=-1).gather(1, ids[:, None])[:, 0]
    return [float(value) for value in log_probs.tolist()]
