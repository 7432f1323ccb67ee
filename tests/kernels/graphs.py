"""The two kinds of graphs a training step is put into: torch.compile's and CUDA's."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastgpt2.generate.graph import capture
from tests.kernels.budget import DEVICE, Outputs, as_tuple

# the interpreter's code is opaque to the compiler: generating C++ around it would prove no more
_BACKEND = "inductor" if DEVICE.type == "cuda" else "aot_eager"


def assert_compiles_whole(op: Callable[..., Outputs], batches: Sequence[dict[str, Tensor]]) -> None:
    """``op(**inputs)`` compiles without a break, forward and backward, and gives eager's numbers.

    Every batch has another length, so that all but the first run through dynamic shapes.
    """
    torch.compiler.reset()
    compiled = torch.compile(op, fullgraph=True, backend=_BACKEND)
    for inputs in batches:
        results = []
        for function in (op, compiled):
            leaves = {
                name: x.detach().clone().requires_grad_(x.is_floating_point())
                for name, x in inputs.items()
            }
            outputs = as_tuple(function(**leaves))
            wanted = [x for x in leaves.values() if x.requires_grad]
            results.append([*outputs, *torch.autograd.grad(outputs, wanted, outputs)])
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected)


def assert_graph_replays(step: Callable[[], Sequence[Tensor]], inputs: Sequence[Tensor]) -> None:
    """``step`` (forward and backward) can be captured, and a replay sees changed inputs.

    Without a GPU there are no graphs: the step is rehearsed, and must see the change.
    """
    if DEVICE.type == "cpu":
        before = step()
        _change(inputs)
        assert not all(torch.equal(*pair) for pair in zip(before, step(), strict=True))
        return
    captured: list[Tensor] = []

    def keep() -> None:
        captured[:] = step()

    replay = capture(keep, DEVICE)
    _change(inputs)
    replay()
    for got, expected in zip(captured, step(), strict=True):
        assert torch.equal(got, expected)


def _change(inputs: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for x in inputs:
            x.copy_(x.flip(0))
