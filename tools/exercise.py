"""``python -m tools.exercise``: run every kernel once, tiny, for a memory checker."""

import sys
from functools import partial

import torch

from benchmarks.harness import Scale
from benchmarks.op_race import works
from benchmarks.ops import op_cases
from fastgpt2.kernels import backend


def main() -> int:
    """Run every op forward and backward, with tiles that overrun every dimension."""
    device = torch.device("cpu" if backend.INTERPRETED else "cuda")
    dtype = torch.float32 if backend.INTERPRETED else torch.bfloat16
    for case in op_cases(Scale.DRY):
        inputs = case.inputs(device, dtype)
        for mode, work in works(case, partial(case.run, "triton"), inputs):
            work()
            print(case.label, mode)
    return 0


if __name__ == "__main__":
    sys.exit(main())
