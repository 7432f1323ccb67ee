"""Triton's interpreter, without the work that it does twice."""

from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def quicken() -> None:
    """Let a launch patch ``triton.language`` once, and not again in each device function it calls.

    The interpreter replaces the language's functions when a kernel is launched, and walks through
    all of them again at each call of a function within it: a third of the time of our kernels.
    What is replaced, and by what, stays the same.
    """
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    if patch.__module__ == __name__:
        return
    patched: set[int] = set()

    def launch_with_a_fresh_patch(self: Any, *arguments: Any, **meta: Any) -> None:
        patched.clear()
        launch(self, *arguments, **meta)

    def patch_once(function: Any) -> Any:
        # the only two modules that it patches
        own = function.__globals__.values()
        seen = {id(value) for value in own if value is tl or value is tl.core}
        if seen and seen <= patched:
            return None
        patched.update(seen)
        return patch(function)

    interpreter.GridExecutor.__call__ = launch_with_a_fresh_patch
    interpreter._patch_lang = patch_once
