"""Triton's interpreter, made faster: it computes the same, but for its rounding to FP8."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.language import random
from triton.runtime import interpreter

# Triton's own
PHILOX = random.philox_impl
CONVERT = interpreter._convert_float
_FP8 = {"fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2}


def quicken() -> None:
    """Remove five costs of the interpreter; results do not change, but for its rounding to FP8."""
    interpreter._patch_lang = _PatchOnce(interpreter._patch_lang)
    tl.core.block_type.__init__ = _remembered_fields(tl.core.block_type.__init__)
    random.philox_impl = philox_rounds
    interpreter._get_np_dtype = _remembered(interpreter._get_np_dtype)
    interpreter._convert_float = rounded_to_fp8
    # it computes whether each integer sum overflows, and asserts that only in debug mode
    options = interpreter.interpreter_builder.options
    assert not options.debug
    interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)


class _PatchOnce:
    """``_patch_lang`` that patches ``triton.language`` once per launch, by a recorded list.

    The interpreter replaces the language's functions when a kernel is launched, and again at each
    call of a device function within it; each time it searches all modules for what to replace.
    What is replaced, and by what, stays the same.
    """

    def __init__(self, patch: Callable[[Any], Any]) -> None:
        self._patch = patch
        self._patched: set[int] = set()
        self._languages: dict[Any, frozenset[int]] = {}
        self._changes: dict[frozenset[int], list[tuple[Any, str, Any]]] = {}
        launch = interpreter.GridExecutor.__call__

        def launch_with_a_fresh_patch(executor: Any, *arguments: Any, **meta: Any) -> None:
            self._patched.clear()
            launch(executor, *arguments, **meta)

        interpreter.GridExecutor.__call__ = launch_with_a_fresh_patch

    def __call__(self, function: Any) -> Any:
        languages = self._languages.get(function)
        if languages is None:
            # the only two modules that it patches
            own = function.__globals__.values()
            languages = frozenset(id(value) for value in own if value is tl or value is tl.core)
            self._languages[function] = languages
        if languages and languages <= self._patched:
            return None
        self._patched.update(languages)
        changes = self._changes.get(languages)
        if changes is None:
            scope = self._patch(function)
            names = {(id(owner), name): (owner, name) for owner, name, _ in scope._changes}
            self._changes[languages] = [(o, name, vars(o)[name]) for o, name in names.values()]
            return scope
        scope = interpreter._LangPatchScope()
        for change in changes:
            scope.set_attr(*change)
        return scope


def _remembered(numpy_dtype: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``_get_np_dtype``, which builds its whole table at each call, with a table of its answers."""
    known: dict[str, Any] = {}

    def of(kind: Any) -> Any:
        scalar = kind.scalar
        if isinstance(scalar, tl.pointer_type):
            return np.dtype(np.uint64)
        if scalar.name not in known:
            known[scalar.name] = numpy_dtype(scalar)
        return known[scalar.name]

    return of


def _remembered_fields(build: Callable[..., None]) -> Callable[..., None]:
    """``block_type.__init__``, which validates its shape at each operation, with its results."""
    known: dict[tuple[Any, ...], dict[str, Any]] = {}

    def init(block: Any, element_ty: Any, shape: Any) -> None:
        sizes = [size.value if isinstance(size, tl.constexpr) else size for size in shape]
        if type(element_ty) is not tl.dtype:
            build(block, element_ty, sizes)
            return
        key = (element_ty.name, *sizes)
        if key not in known:
            build(block, element_ty, sizes)
            known[key] = dict(vars(block))
        vars(block).update(known[key])

    return init


def rounded_to_fp8(data: Any, source: Any, target: Any, rounding: Any) -> Any:
    """``_convert_float``, which rounds ties and numbers below the normal ones to FP8 wrongly.

    As a GPU's instruction, by PyTorch: to the nearest, ties to even, what is too large to the
    largest number. Returns the bits.
    """
    if source.name != "fp32" or target.name not in _FP8:
        return CONVERT(data, source, target, rounding)
    format = _FP8[target.name]
    largest = torch.finfo(format).max
    clamped = torch.from_numpy(np.array(data)).clamp(-largest, largest)
    return clamped.to(format).view(torch.uint8).numpy()


# multipliers of the second and the first counter, and what is added to the two keys
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_RAISES = np.uint32(0x9E3779B9), np.uint32(0xBB67AE85)


def philox_rounds(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any, rounds: Any = 10) -> Any:
    """``triton.language.random.philox_impl`` on 32 bits, a few NumPy calls per round.

    The interpreter takes more than a hundred calls of its own for each: most of a dropout's time.
    """
    kind = c0.type
    assert kind.scalar == tl.uint32, kind
    words = [x.handle.data for x in (c0, c1, c2, c3)]
    keys = [k.handle.data.astype(np.uint32) for k in (k0, k1)]
    for _ in range(int(rounds)):
        first = words[0].astype(np.uint64) * _MULTIPLIERS[0]
        second = words[2].astype(np.uint64) * _MULTIPLIERS[1]
        words = [
            (second >> 32).astype(np.uint32) ^ words[1] ^ keys[0],
            second.astype(np.uint32),
            (first >> 32).astype(np.uint32) ^ words[3] ^ keys[1],
            first.astype(np.uint32),
        ]
        keys = [key + raised for key, raised in zip(keys, _RAISES, strict=True)]
    return tuple(tl.tensor(interpreter.TensorHandle(word, tl.uint32), kind) for word in words)
