"""The decoding step compiled: one call of ``kernels/cpu/decode_step.cpp`` per step.

The C++ is compiled on the machine where it runs, which takes seconds, and kept in the package's
cache. It serves every model and number of rows, so nothing is compiled a second time.
"""

import ctypes
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import POINTER, Structure, c_double, c_int32, c_int64, c_void_p
from functools import cache, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from fastgpt2.compiler import compiler_obstacle, failure, host_compiler
from fastgpt2.devices import device_kind
from fastgpt2.download import cache_dir
from fastgpt2.generate.step import Matrix, Norm, Weights
from fastgpt2.kernels.cpu import build
from fastgpt2.model import GPT

# more tokens at once are faster by a library's matrix products; it has none of int8, and a prompt
# of 1,000 tokens spends its time in attention
MAX_TOKENS, MAX_TOKENS_INT8 = 32, 2048
_NAME = "decode_step"
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
# bytes of weights that are worth a thread: starting one takes some 30 us
_PER_THREAD = 2 << 20
# seconds, on two cores with AVX2: what compiling costs, and what each token saves by the weight
_COST = 6.0
_SAVED = 2.5e-10


class _Matrix(Structure):
    _fields_ = (
        ("weight", c_void_p),
        ("scale", c_void_p),
        ("bias", c_void_p),
        ("features", c_int64),
        ("width", c_int64),
    )


class _Norm(Structure):
    _fields_ = (("weight", c_void_p), ("bias", c_void_p), ("eps", c_double))


class _Layer(Structure):
    _fields_ = (
        ("norm_1", _Norm),
        ("qkv", _Matrix),
        ("proj", _Matrix),
        ("norm_2", _Norm),
        ("fc", _Matrix),
        ("out", _Matrix),
    )


class _Model(Structure):
    _fields_ = (
        ("tokens", _Matrix),
        ("positions", c_void_p),
        ("layers", POINTER(_Layer)),
        ("norm", _Norm),
        ("head", _Matrix),
        ("n_layer", c_int64),
        ("n_head", c_int64),
        ("block_size", c_int64),
        ("weight_kind", c_int32),
        ("cache_kind", c_int32),
        ("erf", c_int32),
    )


class _Step(Structure):
    _fields_ = (
        ("tokens", c_void_p),
        ("lengths", c_void_p),
        ("wanted", c_void_p),
        ("kv", POINTER(c_void_p)),
        ("space", c_void_p),
        ("logits", c_void_p),
        ("B", c_int64),
        ("T", c_int64),
        ("n_wanted", c_int64),
        ("S", c_int64),
        ("plane", c_int64),
        ("threads", c_int64),
    )


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
        layers = (_Layer * len(weights.layers))()
        for entry, layer in zip(layers, weights.layers, strict=True):
            entry.norm_1, entry.norm_2 = self._norm(layer.norm_1), self._norm(layer.norm_2)
            entry.qkv, entry.proj = self._matrix(layer.qkv), self._matrix(layer.proj)
            entry.fc, entry.out = self._matrix(layer.fc), self._matrix(layer.out)
        dtype, positions = weights.positions.dtype, weights.positions.contiguous()
        self._model = _Model(
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
        offset = first * kv[0].stride(1) * kv[0].element_size()
        step = _Step(
            tokens=idx.data_ptr(),
            lengths=lengths.data_ptr(),
            wanted=chosen.data_ptr(),
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
        self._library.decode_step(self._model, step)
        with one_thread():
            return logits.to(self._dtype)

    def _pointer(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _vector(self, vector: Tensor | None) -> int | None:
        return None if vector is None else self._pointer(vector.float().contiguous())

    def _norm(self, norm: Norm) -> _Norm:
        return _Norm(self._vector(norm.weight), self._vector(norm.bias), norm.eps)

    def _matrix(self, layer: Matrix) -> _Matrix:
        vectors = self._vector(layer.scales), self._vector(layer.bias)
        return _Matrix(self._pointer(layer.weight), *vectors, *layer.weight.shape)


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


def pays(model: GPT, new_tokens: int) -> bool:
    """Whether compiling takes less time than it saves, for so many steps of this model.

    What has been compiled before costs nothing.
    """
    device = model.transformer.wpe.weight.device
    if not device_kind(device).host or _obstacle(device) is not None:
        return False
    try:
        if _library_path(host_compiler(), _folder()).exists():
            return True
    except OSError:
        return False
    return new_tokens * sum(p.numel() for p in model.parameters()) * _SAVED > _COST


def load_library(
    device: torch.device, notify: Callable[[str], None] | None = None
) -> ctypes.CDLL | None:
    """The compiled step's library, or None, with one line that says why.

    Args:
        device: of the model.
        notify: shows what was decided, a line each; None says only what failed, as a warning.
    """
    obstacle = _obstacle(device)
    if obstacle is not None:
        (notify or warnings.warn)(f"compile: {obstacle}; generating without it")
        return None
    try:
        compiler = host_compiler()
        path = _library_path(compiler, _folder())
        if notify is not None and not path.exists():
            notify("compile: this takes some seconds the first time")
        return _loaded(compiler, path)
    except OSError as error:
        (notify or warnings.warn)(f"compile: failed ({failure(error)}); generating without it")
        return None


def _obstacle(device: torch.device) -> str | None:
    return "not offered on Windows" if os.name == "nt" else compiler_obstacle(device)


def _folder() -> Path:
    return cache_dir() / "compiled"


@cache
def _library_path(compiler: str, folder: Path) -> Path:
    # starts the compiler, to ask what it compiles for
    return build.library_path(_NAME, compiler, folder)


@cache
def _loaded(compiler: str, path: Path) -> ctypes.CDLL:
    library = build.load(_NAME, compiler, path)
    for function in (library.decode_step, library.space_of):
        function.argtypes = (POINTER(_Model), POINTER(_Step))
    library.decode_step.restype, library.space_of.restype = None, c_int64
    library.use_large_pages.argtypes, library.use_large_pages.restype = (c_void_p, c_void_p), None
    return library
