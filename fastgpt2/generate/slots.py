"""The rows of a key/value cache, by number: feed, cut, copy, reorder."""

import ctypes
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from fastgpt2.cache import KVCache
from fastgpt2.generate.compiled import CompiledStep, Draw, one_thread
from fastgpt2.generate.gpu_step import gpu_weights_of
from fastgpt2.generate.graph import Choice, graph_step
from fastgpt2.generate.library import load_library
from fastgpt2.generate.step import (
    logits_after,
    logits_after_prompt,
    plain_weights,
    weights_of,
)
from fastgpt2.kernels.modes import autocasts
from fastgpt2.model import GPT
from fastgpt2.plain import execution_device

# what a pass may take beside the weights and the cache: a share of both, or so many bytes
_SHARE, _LEAST = 0.08, 1 << 24
# numbers per token that it takes, as multiples of the width: the MLP's hidden layer twice, q, k, v
# and the stream
_WIDTHS = 14


class Slots:
    """``count`` rows of ``size`` tokens, each with a length of its own.

    Args:
        model: the model whose keys and values they hold.
        count: number of rows.
        size: tokens per row, at most block_size.
        compile: whether to compile a step, if possible.
        notify: shows what came of that, in a line; None shows only failures, as a warning.

    Attributes:
        lengths: tokens in each row.
        compiled: the compiled step on a CPU, or None.
        graph: the captured step on a GPU, or None; also None while the model is not plain.
    """

    def __init__(
        self,
        model: GPT,
        count: int,
        size: int,
        *,
        compile: bool = False,
        notify: Callable[[str], None] | None = None,
    ) -> None:
        self.model, self.size = model, size
        self.device = execution_device(model.transformer.wpe)
        # read again with each prompt; None if the step does not support the model
        self._weights = weights_of(model)
        self._library: ctypes.CDLL | None = None
        on_gpu = gpu_weights_of(model) is not None
        on_cpu = self._weights is not None and CompiledStep.fits(self._weights)
        if compile and not (on_cpu or on_gpu):
            (notify or warnings.warn)(
                "compile: for plain models in fp32, bf16 or int8 on a CPU or on the Triton kernels "
                "only; generating without it"
            )
        elif compile and on_cpu:
            self._library = load_library(self.device, notify)
        # a captured step writes a key for every row, also for one that is full
        room = size + 1 if compile and on_gpu else size
        self.cache = model.make_cache(count, room)
        held = [*(layer.kv for layer in self.cache.layers), *model.parameters(), *model.buffers()]
        per_token = _WIDTHS * model.config.n_embd * held[0].element_size()
        may_take = max(_LEAST, int(_SHARE * sum(t.nbytes for t in held)))
        self._tokens_per_pass = may_take // per_token
        self.lengths = [0] * count
        self._seen = torch.arange(room, device=self.device)
        self.compiled = self._compile()
        self._graph = graph_step(model, self.cache, notify) if compile and on_gpu else None
        self.graph = self._graph

    def feed(self, first: int, tokens: Sequence[Sequence[int]], *, every: bool = False) -> Tensor:
        """Append ``tokens[i]`` to row ``first + i``, for adjacent rows.

        They share a pass of the model, or several passes where it would take too much memory.

        Args:
            first: the first row.
            tokens: for each row 1 or more token ids. A row needs room for as many tokens as the
                longest list has.
            every: return the logits after every token, not only after each row's last one.

        Returns:
            (rows, V), or (rows, T, V); logits after a row's own tokens have no meaning.
        """
        counts = [len(ids) for ids in tokens]
        T, stop = max(counts), first + len(tokens)
        rows_per_pass = max(1, self._tokens_per_pass // T)
        if not every and rows_per_pass < len(tokens):
            parts = range(0, len(tokens), rows_per_pass)
            return torch.cat([self.feed(first + i, tokens[i : i + rows_per_pass]) for i in parts])
        is_new = T > 1 or 0 in self.lengths[first:stop]
        if is_new:
            self._weights = weights_of(self.model)
            self.compiled = self._compile()
            if self._graph is not None:
                self.graph = self._graph if self._graph.refresh() else None
        padded = [[*ids, *[0] * (T - len(ids))] for ids in tokens]
        plain = not autocasts(self.device)
        step = self.compiled if plain else None
        if step is not None and len(tokens) * T <= step.max_tokens:
            return self._compiled_step(step, first, padded, counts, every)
        if not is_new and plain and self.graph is not None:
            logits = self.graph.logits_after(first, [ids[0] for ids in tokens])
            self._count(first, stop, 1)
            return logits[:, None] if every else logits
        if not is_new and plain and self._weights is not None:
            logits = self._step(first, [ids[0] for ids in tokens])
            return logits[:, None] if every else logits
        idx = torch.tensor(padded, dtype=torch.int64, device=self.device)
        last = torch.tensor(counts, device=self.device) - 1
        is_prompt = not any(self.lengths[first:stop])
        if is_prompt and not every and plain and self._weights is not None:
            kv = [layer.kv[:, first:stop] for layer in self.cache.layers]
            logits = logits_after_prompt(self._weights, idx, last, kv)
        else:
            rows = self.cache.rows(first, stop, is_empty=is_prompt)
            logits = self._by_model(idx, rows, None if every else last)
        self._grow(first, counts)
        return logits

    def _by_model(self, idx: Tensor, rows: KVCache, last: Tensor | None) -> Tensor:
        """The logits after token ``last`` (B,) of each row of idx (B, T); None means all."""
        if last is None:
            return self.model.head(self.model.hidden_states(idx, rows))
        if idx.shape[1] > 1 and self._is_plain():
            hidden = self.model.hidden_states(idx, rows, wanted=last)[:, 0]
        else:
            hidden = self.model.hidden_states(idx, rows)
            hidden = hidden[torch.arange(len(idx), device=self.device), last]
        return self.model.head(hidden)

    def _is_plain(self) -> bool:
        """Whether the model was plain when the last prompt came."""
        steps = self._weights, self.graph
        return any(s is not None for s in steps) or plain_weights(self.model) is not None

    def choosing(self) -> AbstractContextManager[None]:
        """Where tokens are chosen from logits: on one thread, between compiled steps."""
        return nullcontext() if self.compiled is None else one_thread()

    def _compile(self) -> CompiledStep | None:
        """The compiled step with the model's present weights, where there is one."""
        weights = self._weights
        if self._library is None or weights is None or not CompiledStep.fits(weights):
            return None
        if weights.positions.dtype != self.cache.layers[0].kv.dtype:
            # the model was converted; the step would write beyond the cache
            return None
        return CompiledStep(self._library, weights)

    def _compiled_step(
        self,
        step: CompiledStep,
        first: int,
        tokens: list[list[int]],
        counts: list[int],
        every: bool,
    ) -> Tensor:
        """``feed`` by the compiled step, for lists of one length."""
        B, T = len(tokens), len(tokens[0])
        if max(self.lengths[first : first + B]) + T > self.cache.size:
            raise IndexError(f"{T} more tokens do not fit into rows of {self.cache.size}")
        wanted = [*range(B * T)] if every else [i * T + n - 1 for i, n in enumerate(counts)]
        kv = [layer.kv for layer in self.cache.layers]
        lengths = self.cache.lengths[first : first + B]
        logits = step(tokens, wanted, lengths, kv, first)
        self._grow(first, counts)
        return logits.view(B, T, -1) if every else logits

    def _step(self, first: int, tokens: list[int]) -> Tensor:
        """One token for each of some adjacent rows: their logits (rows, V)."""
        assert self._weights is not None
        stop = first + len(tokens)
        n = max(self.lengths[first:stop]) + 1
        lengths = self.cache.lengths[first:stop]
        idx = torch.tensor(tokens, device=self.device)
        kv = [layer.kv[:, first:stop] for layer in self.cache.layers]
        logits = logits_after(self._weights, idx, lengths, kv, self._seen[:n])
        lengths += 1
        self._count(first, stop, 1)
        return logits

    def _grow(self, first: int, counts: list[int]) -> None:
        """Row ``first + i`` holds ``counts[i]`` tokens more."""
        for i, count in enumerate(counts):
            self.lengths[first + i] += count
        self._write(first, first + len(counts))

    def runs_ahead(self, rows: int) -> bool:
        """Whether several tokens of the first ``rows`` rows can be chosen without the host."""
        compiled = self.compiled is not None and self.compiled.runs_ahead(rows)
        return compiled or self.graph is not None

    def compiled_ahead(
        self, tokens: list[int], count: int, known: int | None, draw: Draw | None
    ) -> tuple[list[list[int]], list[list[float]]]:
        """``CompiledStep.ahead``; the cache then holds all chosen tokens except each row's last."""
        assert self.compiled is not None
        B, kv = len(tokens), [layer.kv for layer in self.cache.layers]
        if max(self.lengths[:B]) + count > self.cache.size:
            raise IndexError(f"{count} more tokens do not fit into rows of {self.cache.size}")
        known = self.model.config.vocab_size if known is None else known
        found = self.compiled.ahead(tokens, self.cache.lengths[:B], kv, count, known, draw)
        self._grow(0, [count] * B)
        return found

    def ahead(
        self, tokens: list[int], count: int, choose: Choice
    ) -> tuple[list[list[int]], list[list[float]]]:
        """``GraphStep.ahead``; the cache then holds all chosen tokens except each row's last."""
        assert self.graph is not None
        found = self.graph.ahead(tokens, count, choose)
        self._count(0, len(tokens), count)
        return found

    def _count(self, first: int, stop: int, new: int) -> None:
        """Update the host's lengths; the device has already updated its own."""
        self.lengths[first:stop] = [length + new for length in self.lengths[first:stop]]

    def cut(self, lengths: Sequence[int], first: int = 0) -> None:
        """Keep the first ``lengths[i]`` tokens of row ``first + i``."""
        stop = first + len(lengths)
        if self.lengths[first:stop] != list(lengths):
            self.lengths[first:stop] = lengths
            self._write(first, stop)

    def rewrite(self) -> None:
        """Give the device the host's lengths, whatever it has."""
        self._write(0, len(self.lengths))

    def copy(self, source: int, target: int) -> None:
        """Copy row ``source`` to row ``target``."""
        self.cache.copy_row(source, target)
        self.lengths[target] = self.lengths[source]

    def reorder(self, rows: Sequence[int]) -> None:
        """Copy row ``rows[i]`` to row i, for the first rows of the cache."""
        if list(rows) != list(range(len(rows))):
            self.cache.reorder(torch.tensor(rows, device=self.device))
            self.lengths[: len(rows)] = [self.lengths[row] for row in rows]

    def _write(self, first: int, stop: int) -> None:
        lengths = torch.tensor(self.lengths[first:stop], device=self.device)
        self.cache.lengths[first:stop] = lengths
