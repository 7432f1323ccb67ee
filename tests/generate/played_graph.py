"""A CUDA graph without CUDA: the operators of a step are recorded once, and played again.

As in a real graph, what is played reads and writes the tensors that were there at the capture, and
whatever the host had looked at would stay as it was then.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# what waits for the GPU, or gives the host a number
HOST = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.is_nonzero.default,
}


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps every call of an operator."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in HOST, f"{func} waits for the GPU"
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    @property
    def names(self) -> list[str]:
        """The operators that launch something: no views, no fresh memory."""
        free = ("empty", "new_empty", "detach", "alias")
        return [
            func._schema.name
            for func, *_ in self.calls
            if not func.is_view and func._schema.name.partition("::")[2] not in free
        ]


class PlayedGraphs:
    """Stands for ``graph.capture``, and counts captures and replays.

    Attributes:
        captures: graphs so far.
        replays: of all of them.
        interrupt_after: how many replays to let pass before one is an interrupt.
    """

    def __init__(self) -> None:
        self.captures = self.replays = 0
        self.interrupt_after: int | None = None

    def __call__(self, step: Callable[[], None], device: torch.device) -> Callable[[], None]:
        step()
        recorder = Recorder()
        with recorder:
            step()
        self.captures += 1

        def replay() -> None:
            if self.replays == self.interrupt_after:
                self.interrupt_after = None
                raise KeyboardInterrupt
            self.replays += 1
            for func, args, kwargs, out in recorder.calls:
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)

        return replay
