"""``python -m tests.benchmarks.quickened -m MODULE ...``: the same, in a quick interpreter."""

import runpy
import sys

from tests.kernels.interpreter import quicken

if __name__ == "__main__":
    flag, module, *arguments = sys.argv[1:]
    assert flag == "-m"
    quicken()
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)
