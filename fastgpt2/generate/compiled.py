"""The decoding step compiled: one call of ``kernels/cpu/decode_step.cpp`` for one or several."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_void_p
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fastgpt2.generate.library import CChoice, CLayer, CMatrix, CModel, CNorm, CStep
from fastgpt2.generate.step import Matrix, Norm, Weights

# more tokens at once are faster by a library's matrix products; it has none of int8, and a prompt
# of 1,000 tokens spends its time in attention
MAX_TOKENS, MAX_TOKENS_INT8 = 32, 2048
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
# bytes of weights that are worth a thread: starting one takes some 30 us
_PER_THREAD = 2 << 20
# bytes of weights that are read in some 3 ms: for larger models, the host's work per token is
# nothing beside the step's, and a reader would notice tokens that come together
_SMALL = 64 << 20
# logits of a step whose random numbers are few enough to be drawn for several steps at once
_FEW_LOGITS = 1 << 16


class Draw(NamedTuple):
    """How tokens are drawn: after temperature and top-k, by the first of exponential clocks.

    Attributes:
        temperature: above 0.
        top_k: None for no limit.
        times: (count, B, V) fp32, when clocks of rate 1 ring.
    """

    temperature: float
    top_k: int | None
    times: Tensor


class CompiledStep:
    """``logits_after`` of one model, by the library.

    It reads the model's own weights, but copies of vectors that are not in fp32. Between the cache
    and the weights all is computed in fp32.

    Args:
        library: what ``load_library`` gives.
        weights: the model's; ``fits`` says whether this step knows them.

    Attributes:
        max_tokens: how many tokens at once it is meant for.
    """

    def __init__(self, library: ctypes.CDLL, weights: Weights) -> None:
        self._library = library
        # keeps the tensors alive that pointers point to
        self._kept: list[Tensor] = []
        layers = (CLayer * len(weights.layers))()
        for entry, layer in zip(layers, weights.layers, strict=True):
            entry.norm_1, entry.norm_2 = self._norm(layer.norm_1), self._norm(layer.norm_2)
            entry.qkv, entry.proj = self._matrix(layer.qkv), self._matrix(layer.proj)
            entry.fc, entry.out = self._matrix(layer.fc), self._matrix(layer.out)
        dtype, positions = weights.positions.dtype, weights.positions.contiguous()
        self._model = CModel(
            tokens=self._matrix(weights.tokens),
            positions=self._pointer(positions),
            layers=layers,
            norm=self._norm(weights.norm),
            head=self._matrix(weights.head),
            n_layer=len(weights.layers),
            n_head=weights.n_head,
            block_size=positions.shape[0],
            weight_kind=_KINDS[weights.head.weight.dtype],
            cache_kind=_KINDS[dtype],
            erf=weights.approximate == "none",
        )
        is_int8 = weights.head.weight.dtype == torch.int8
        # moving fp32 costs half a second, and saves a millisecond of a token's 27
        if weights.head.weight.dtype != torch.float32:
            for first, stop in _adjacent(_matrices(weights)):
                _use_large_pages(library, first, stop)
        self.max_tokens = MAX_TOKENS_INT8 if is_int8 else MAX_TOKENS
        self._dtype, self._vocabulary = dtype, weights.tokens.weight.shape[0]
        self._features = weights.head.weight.shape[0]
        size = sum(p.numel() * p.element_size() for p in _matrices(weights))
        self._threads = max(1, min(torch.get_num_threads(), size // _PER_THREAD))
        self._is_small = size < _SMALL
        self._space = torch.empty(0)

    @staticmethod
    def fits(weights: Weights) -> bool:
        """Whether the library can compute with such weights."""
        matrices = _matrices(weights)
        kinds, dtype = {matrix.dtype for matrix in matrices}, weights.positions.dtype
        known = dtype in (torch.float32, torch.bfloat16) and len(kinds) == 1
        return known and kinds <= {dtype, torch.int8} and all(m.is_contiguous() for m in matrices)

    def __call__(
        self,
        tokens: list[list[int]],
        wanted: list[int],
        lengths: Tensor,
        kv: list[Tensor],
        first: int,
    ) -> Tensor:
        """Logits after T more tokens of each of B rows, whose keys and values go into the cache.

        Args:
            tokens: B lists of T, at most ``max_tokens`` together.
            wanted: whose logits, as rising numbers below B T.
            lengths: (B,) int64, how many tokens of each row are in the cache.
            kv: of each layer (2, rows, H, S, D), keys and values, written from ``lengths`` on.
            first: the row of the cache that the first list is of.

        Returns:
            (len(wanted), V) in the model's dtype.
        """
        idx, V = torch.tensor(tokens), self._vocabulary
        if min(map(min, tokens)) < 0 or max(map(max, tokens)) >= V:
            raise IndexError(f"token ids must be in [0, {V}), got {tokens}")
        chosen, logits = torch.tensor(wanted), torch.empty(len(wanted), self._features)
        step = self._step(idx, chosen, logits, lengths, kv, first)
        self._library.decode_step(self._model, step)
        with one_thread():
            return logits.to(self._dtype)

    def runs_ahead(self, rows: int) -> bool:
        """Whether several tokens of so many rows should be chosen by one call."""
        few = rows <= self.max_tokens and rows * self._features <= _FEW_LOGITS
        return self._is_small and few

    def ahead(
        self,
        tokens: list[int],
        lengths: Tensor,
        kv: list[Tensor],
        count: int,
        known: int,
        draw: Draw | None,
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Several more tokens of the first B rows of the cache, chosen where the logits are.

        Args:
            tokens: the newest token of each row, which the cache does not hold yet.
            lengths: (B,) int64, how many tokens of each row are in the cache.
            kv: as above, written from ``lengths`` on.
            count: how many tokens to choose.
            known: only ids below it may follow.
            draw: how they are drawn; None takes the best.

        Returns:
            ``count`` lists of the chosen tokens, and of the largest logits that they were chosen
            from: NaN or infinite where the logits are.
        """
        B = len(tokens)
        # both are counted on in C++
        idx, lengths = torch.tensor(tokens)[:, None], lengths.clone()
        chosen, best = torch.empty(count, B, dtype=torch.int64), torch.empty(count, B)
        logits, wanted = torch.empty(B, self._features), torch.arange(B)
        choice = CChoice(
            times=None if draw is None else draw.times.data_ptr(),
            tokens=chosen.data_ptr(),
            best=best.data_ptr(),
            temperature=1.0 if draw is None else draw.temperature,
            top_k=0 if draw is None or draw.top_k is None else draw.top_k,
            known=min(known, self._features),
        )
        step = self._step(idx, wanted, logits, lengths, kv, 0)
        self._library.decode_ahead(self._model, step, choice, count)
        return chosen.tolist(), best.tolist()

    def _step(
        self,
        idx: Tensor,
        wanted: Tensor,
        logits: Tensor,
        lengths: Tensor,
        kv: list[Tensor],
        first: int,
    ) -> CStep:
        """What a call reads and writes; the caller keeps the tensors alive."""
        offset = first * kv[0].stride(1) * kv[0].element_size()
        step = CStep(
            tokens=idx.data_ptr(),
            lengths=lengths.data_ptr(),
            wanted=wanted.data_ptr(),
            kv=(c_void_p * len(kv))(*(layer.data_ptr() + offset for layer in kv)),
            logits=logits.data_ptr(),
            B=idx.shape[0],
            T=idx.shape[1],
            n_wanted=len(wanted),
            S=kv[0].shape[3],
            plane=kv[0].stride(0),
            threads=self._threads,
        )
        space = self._library.space_of(self._model, step)
        if self._space.numel() < space:
            self._space = torch.empty(space)
        step.space = self._space.data_ptr()
        return step

    def _pointer(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _vector(self, vector: Tensor | None) -> int | None:
        return None if vector is None else self._pointer(vector.float().contiguous())

    def _norm(self, norm: Norm) -> CNorm:
        return CNorm(self._vector(norm.weight), self._vector(norm.bias), norm.eps)

    def _matrix(self, layer: Matrix) -> CMatrix:
        vectors = self._vector(layer.scales), self._vector(layer.bias)
        return CMatrix(self._pointer(layer.weight), *vectors, *layer.weight.shape)


def _matrices(weights: Weights) -> list[Tensor]:
    layers = [m for part in weights.layers for m in (part.qkv, part.proj, part.fc, part.out)]
    return [m.weight for m in (*layers, weights.tokens, weights.head)]


def _adjacent(tensors: list[Tensor]) -> list[tuple[int, int]]:
    """[first, stop) addresses of tensors; at most two small pages between them are taken along."""
    ranges: list[tuple[int, int]] = []
    for t in sorted(tensors, key=lambda t: t.data_ptr()):
        first, stop = t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()
        if ranges and first - ranges[-1][1] <= 8192:
            first, stop = ranges.pop()[0], max(stop, first)
        ranges.append((first, stop))
    return ranges


@lru_cache(maxsize=256)
def _use_large_pages(library: ctypes.CDLL, first: int, stop: int) -> None:
    """Read [first, stop) by pages of 2 MB from now on. Asked once: each time takes milliseconds."""
    library.use_large_pages(first, stop)


@contextmanager
def one_thread() -> Iterator[None]:
    """Within the block, PyTorch's operators run on the calling thread alone.

    After an operator, OpenMP's other threads spin for milliseconds until they sleep. They would
    hold the processors that the next step needs.
    """
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)
