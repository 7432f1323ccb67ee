"""The library of ``kernels/cpu/decode_step.cpp``: its structures; compiling and loading it.

The C++ is compiled on the machine where it runs, which takes seconds, and kept in the package's
cache. It serves every model and number of rows, so nothing is compiled a second time.
"""

import ctypes
import os
import warnings
from collections.abc import Callable
from ctypes import POINTER, Structure, c_double, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch

from fastgpt2.compiler import compiler_obstacle, failure, host_compiler
from fastgpt2.devices import device_kind
from fastgpt2.download import cache_dir
from fastgpt2.kernels.cpu import build
from fastgpt2.model import GPT

_NAME = "decode_step"
# seconds, on two cores with AVX2: what compiling costs, and what each token saves by the weight
_COST = 6.0
_SAVED = 2.5e-10


class CMatrix(Structure):
    """``Matrix`` of ``products.h``."""

    _fields_ = (
        ("weight", c_void_p),
        ("scale", c_void_p),
        ("bias", c_void_p),
        ("features", c_int64),
        ("width", c_int64),
    )


class CNorm(Structure):
    """``Norm`` of ``decode_step.cpp``."""

    _fields_ = (("weight", c_void_p), ("bias", c_void_p), ("eps", c_double))


class CLayer(Structure):
    """``Layer`` of ``decode_step.cpp``."""

    _fields_ = (
        ("norm_1", CNorm),
        ("qkv", CMatrix),
        ("proj", CMatrix),
        ("norm_2", CNorm),
        ("fc", CMatrix),
        ("out", CMatrix),
    )


class CModel(Structure):
    """``Model`` of ``decode_step.cpp``."""

    _fields_ = (
        ("tokens", CMatrix),
        ("positions", c_void_p),
        ("layers", POINTER(CLayer)),
        ("norm", CNorm),
        ("head", CMatrix),
        ("n_layer", c_int64),
        ("n_head", c_int64),
        ("block_size", c_int64),
        ("weight_kind", c_int32),
        ("cache_kind", c_int32),
        ("erf", c_int32),
    )


class CStep(Structure):
    """``Step`` of ``decode_step.cpp``."""

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


class CChoice(Structure):
    """``Choice`` of ``choice.h``."""

    _fields_ = (
        ("times", c_void_p),
        ("tokens", c_void_p),
        ("best", c_void_p),
        ("temperature", c_double),
        ("top_k", c_int64),
        ("known", c_int64),
    )


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
        function.argtypes = (POINTER(CModel), POINTER(CStep))
    library.decode_step.restype, library.space_of.restype = None, c_int64
    library.decode_ahead.argtypes = (POINTER(CModel), POINTER(CStep), POINTER(CChoice), c_int64)
    library.decode_ahead.restype = None
    library.use_large_pages.argtypes, library.use_large_pages.restype = (c_void_p, c_void_p), None
    return library
