"""Every op is launched as on a GPU: bound, specialised and compiled, all but executed."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastgpt2.kernels.gpus import ARCHITECTURES

JIT = Path(__file__).resolve().parents[2] / "kernels" / "jit"


def _kernels() -> set[str]:
    """Names of all kernels: the functions that ``launch_*`` functions launch."""
    return {
        node.name
        for path in JIT.glob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }


@pytest.mark.parametrize(("arch", "dtype"), [("sm_90", "bfloat16"), ("sm_80", "float32")])
def test_every_kernel_is_launched(arch: str, dtype: str) -> None:
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.launch_without_gpu", arch, dtype],
        env=variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    shared = json.loads(done.stdout.splitlines()[-1])
    assert set(shared) == _kernels()
    limit = ARCHITECTURES[arch].block_shared
    assert not {name: size for name, size in shared.items() if size > limit}
