"""Triton's interpreter, without the work that it does in vain or twice."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def quicken() -> None:
    """Take three costs off the interpreter; what a kernel computes stays the same."""
    interpreter._patch_lang = _PatchOnce(interpreter._patch_lang)
    interpreter._get_np_dtype = _remembered(interpreter._get_np_dtype)
    # for each integer sum it computes whether the sum overflows, and then ignores the answer:
    # the assertion is one of debug mode
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
