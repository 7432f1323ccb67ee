"""The decoding step as one CUDA graph over buffers with fixed addresses.

A launch costs the host several microseconds, and a step of GPT-2 124M has over 60 of them: more
time than the GPU needs for their work at batch 1. Captured once, they are one launch. Token ids,
lengths, keys, values and logits keep their addresses, so each replay computes the next token, and
the host reads the tokens only after several steps. The greedy choice is part of a graph of its own:
then nothing at all is launched between two tokens.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastgpt2.cache import KVCache
from fastgpt2.compiler import failure
from fastgpt2.devices import device_kind
from fastgpt2.generate.gpu_step import gpu_greedy_after, gpu_logits_after, gpu_weights_of
from fastgpt2.generate.step import Weights, features_of
from fastgpt2.model import GPT

# steps between two reads of the host
AHEAD = 8


@dataclass(frozen=True)
class Greedy:
    """The choice of the largest logit, which is made within the graph.

    Attributes:
        known: only ids below this may be chosen; None means all.
    """

    known: int | None = None


# or (rows, V) logits -> the tokens (rows,), and the largest logit of each that it chose from
Choice = Greedy | Callable[[Tensor], tuple[Tensor, Tensor]]


def capture(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """A function that repeats ``step``: the replay of its CUDA graph; without a GPU ``step``.

    On a GPU ``step`` runs once before, since nothing can be compiled or loaded during a capture.
    """
    if not device_kind(device).cuda:
        return step
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
    replay: Callable[[], None] = graph.replay
    return replay


class GraphStep:
    """The step of a model for all rows of a cache; those that are not fed keep their lengths.

    Args:
        model: a plain model on the Triton kernels.
        cache: keys and values; its lengths advance with the step.

    Raises:
        ValueError: the step does not support the model.
    """

    def __init__(self, model: GPT, cache: KVCache) -> None:
        self._model, self._cache = model, cache
        lengths = cache.lengths
        self._tokens, self._active = torch.zeros_like(lengths), torch.zeros_like(lengths)
        # of the greedy choice: tokens and logits that the host has not read; fp64 holds both
        self._steps = torch.full_like(lengths, -1)
        self._recent = lengths.new_zeros(2, AHEAD, len(lengths), dtype=torch.float64)
        # first row and tokens that the buffers hold, as far as the host knows
        self._held: tuple[int, list[int]] = 0, []
        self._fed = (0, 0)
        self._captured: tuple[tuple[int, torch.dtype], ...] = ()
        if not self.refresh():
            raise ValueError("the model is not plain, or not on the Triton kernels")

    def refresh(self) -> bool:
        """Capture the step again if the model has other tensors; False if that is not possible."""
        weights = gpu_weights_of(self._model)
        if weights is None:
            return False
        tensors = [leaf for leaf in tree_leaves(weights) if isinstance(leaf, Tensor)]
        identity = tuple((tensor.data_ptr(), tensor.dtype) for tensor in tensors)
        if identity != self._captured:
            self._replay = self._capture(lambda: self._step(weights))
            self._greedy: dict[Greedy, Callable[[], None]] = {}
            self._weights, self._captured = weights, identity
        return True

    @torch.no_grad()
    def _capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """The replay of ``step``, captured while no row advances."""
        self._feed_rows((0, 0))
        self._steps.fill_(-1)
        return capture(step, self._tokens.device)

    def _step(self, weights: Weights) -> None:
        kv, lengths = [layer.kv for layer in self._cache.layers], self._cache.lengths
        impl = self._model.config.impl
        self._logits = gpu_logits_after(weights, self._tokens, lengths, kv, impl)
        lengths.add_(self._active)

    def _greedy_step(self, weights: Weights) -> None:
        kv, lengths = [layer.kv for layer in self._cache.layers], self._cache.lengths
        buffers = self._steps, self._recent
        gpu_greedy_after(weights, self._tokens, lengths, kv, *buffers, self._model.config.impl)

    def _greedy_replay(self, choice: Greedy) -> Callable[[], None]:
        """The replay of a step with this choice, which is captured when it is first wanted."""
        if choice not in self._greedy:
            weights = self._weights._replace(head=features_of(self._weights.head, 0, choice.known))
            self._greedy[choice] = self._capture(lambda: self._greedy_step(weights))
        return self._greedy[choice]

    def _feed_rows(self, rows: tuple[int, int]) -> None:
        """Only rows ``first`` to ``stop`` - 1 advance from now on."""
        if rows != self._fed:
            self._active.zero_()
            self._active[slice(*rows)] = 1
            self._fed = rows

    def _load(self, first: int, tokens: list[int]) -> Tensor:
        """The buffer of these rows' tokens, which holds them."""
        stop = first + len(tokens)
        self._feed_rows((first, stop))
        buffer = self._tokens[first:stop]
        if self._held != (first, tokens):
            buffer.copy_(torch.tensor(tokens))
            self._held = first, tokens
        return buffer

    @torch.no_grad()
    def logits_after(self, first: int, tokens: list[int]) -> Tensor:
        """The logits after one more token of each of some adjacent rows.

        Args:
            first: the first row.
            tokens: the newest token of each row, which the cache does not hold yet.

        Returns:
            (rows, V).
        """
        self._load(first, tokens)
        self._replay()
        return self._logits[first : first + len(tokens)].clone()

    @torch.no_grad()
    def ahead(
        self, tokens: list[int], count: int, choose: Choice
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Several more tokens of the first rows; the host waits once, for all of them.

        Args:
            tokens: the newest token of each row, which the cache does not hold yet.
            count: how many to choose, 1 to ``AHEAD``.
            choose: ``Greedy``, or called with the logits (rows, V), which the next step overwrites.

        Returns:
            ``count`` lists of the chosen tokens, and of the largest logits.
        """
        buffer = self._load(0, tokens)
        # known again after the last step: an interrupt may come before
        self._held = 0, []
        if isinstance(choose, Greedy):
            steps = self._choose_greedily(len(tokens), count, choose)
        else:
            steps = self._choose(buffer, count, choose)
        ids, values = steps.tolist()
        written = [[int(id_) for id_ in step] for step in ids]
        self._held = 0, written[-1]
        return written, values

    def _choose(
        self, buffer: Tensor, count: int, choose: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> Tensor:
        """(2, count, rows) fp64: the chosen tokens, and the largest logits."""
        steps = []
        for _ in range(count):
            self._replay()
            chosen, best = choose(self._logits[: len(buffer)])
            buffer.copy_(chosen)
            steps.append(torch.stack([chosen.double(), best.double()]))
        return torch.stack(steps, 1)

    def _choose_greedily(self, rows: int, count: int, choice: Greedy) -> Tensor:
        """The same, without a launch between two steps."""
        replay = self._greedy_replay(choice)
        self._steps[:] = -1
        self._steps[:rows] = 0
        for _ in range(count):
            replay()
        return self._recent[:, :count, :rows]


def graph_step(
    model: GPT, cache: KVCache, notify: Callable[[str], None] | None = None
) -> GraphStep | None:
    """The captured step, or None, with one line that says why.

    Args:
        model: a plain model on the Triton kernels.
        cache: the cache of all steps to come.
        notify: shows each decision in a line; None shows only failures, as a warning.
    """
    try:
        step = GraphStep(model, cache)
    except Exception as error:
        (notify or warnings.warn)(f"compile: failed ({failure(error)}); generating without it")
        return None
    if notify is not None:
        notify("compile: on; a decoding step is one CUDA graph")
    return step
