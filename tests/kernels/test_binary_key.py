"""A binary's key changes with everything that the binary depends on, and with nothing else."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastgpt2.kernels.cases import CompileCase
from fastgpt2.kernels.jit import binary_key as keys
from fastgpt2.kernels.jit import compile as offline
from fastgpt2.kernels.jit.binary_key import binary_key
from fastgpt2.kernels.jit.launch import COMPILER_OPTIONS
from tests.compiling import run_compiling
from tests.kernels import planted_kernels

KERNEL = '''
"""A module."""

import triton
import triton.language as tl

SCALE = tl.constexpr(2.0)
STEPS = 3


@triton.jit
def scaled(x, unused=1):
    return x * SCALE


@triton.jit
def helper(x):
    # one more hop
    return scaled(x) + 1.0


@triton.jit
def kernel(x_ptr, n, BLOCK: tl.constexpr):
    """Scale."""
    offs = tl.arange(0, BLOCK)
    for _ in range(STEPS):
        x = tl.load(x_ptr + offs, mask=offs < n, other=0.0)
        tl.store(x_ptr + offs, helper(x), mask=offs < n)


@triton.jit
def other(x_ptr):
    tl.store(x_ptr, 1.0)
'''


def _sources(folder: Path, name: str, text: str) -> str:
    """``sources`` of the kernel in a module of this text."""
    path = folder / f"{name}.py"
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("written", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return keys.sources(module.kernel)


@pytest.mark.parametrize(
    ("old", "new", "changes"),
    [
        ("offs < n, other", "offs <= n, other", True),
        ("other=0.0", "other=1.0", True),
        ("range(STEPS)", "tl.range(STEPS)", True),
        ("BLOCK: tl.constexpr", "BLOCK", True),
        ("def kernel(x_ptr, n,", "def kernel(x_ptr, n: tl.int64,", True),
        ("@triton.jit\ndef kernel", "@triton.jit(noinline=True)\ndef kernel", True),
        # what it uses, at any depth
        ("+ 1.0", "- 1.0", True),
        ("x * SCALE", "x / SCALE", True),
        ("constexpr(2.0)", "constexpr(2.5)", True),
        ("STEPS = 3", "STEPS = 4", True),
        ("unused=1", "unused=2", True),
        # what is not code, and what it does not use
        ("# one more hop", "# another comment", False),
        ('"""Scale."""', '"""Another docstring."""', False),
        ('    """Scale."""\n', "", False),
        ('"""A module."""', '"""A module\n\nof more lines."""', False),
        ("SCALE = tl", "\n\n\nSCALE = tl", False),
        (
            "mask=offs < n, other=0.0)",
            "\n            mask=(offs < n),\n            other=0.0)",
            False,
        ),
        ("x_ptr, 1.0", "x_ptr, 2.0", False),
    ],
)
def test_a_key_follows_the_code(old: str, new: str, changes: bool, tmp_path: Path) -> None:
    assert KERNEL.count(old) == 1
    before = _sources(tmp_path, "before", KERNEL)
    assert (_sources(tmp_path, "after", KERNEL.replace(old, new)) != before) == changes


def test_a_name_without_a_value_is_refused(tmp_path: Path) -> None:
    """An attribute of a module of ours, or an object without a lasting name, would escape."""
    for value in ("__import__('fastgpt2').__spec__.loader", "__import__('fastgpt2')"):
        with pytest.raises(AssertionError, match="a kernel uses"):
            _sources(tmp_path, "unknown", KERNEL.replace("STEPS = 3", f"STEPS = {value}"))


@pytest.fixture
def case() -> CompileCase:
    """A planted kernel's."""
    return planted_kernels.compile_cases("sm_80")[0]


@pytest.mark.parametrize(
    ("change", "changes"),
    [
        ({"signature": {"a_ptr": "*fp16"}}, True),
        ({"constexprs": {"BLOCK_M": 32}}, True),
        ({"num_warps": 8}, True),
        ({"num_stages": 3}, True),
        ({"divisible_by_16": ("a_ptr",)}, True),
        ({"name": "another", "config": "another"}, False),
        ({"flops": 2.0, "bytes": 2.0, "per_sm": 2, "wants_mma": False}, False),
    ],
    ids=str,
)
def test_a_key_follows_the_case(case: CompileCase, change: dict[str, Any], changes: bool) -> None:
    merged = {
        name: getattr(case, name) | value if isinstance(value, dict) else value
        for name, value in change.items()
    }
    assert (binary_key(replace(case, **merged), "sm_80") != binary_key(case, "sm_80")) == changes


def test_a_key_follows_the_compilers(case: CompileCase, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {binary_key(case, arch) for arch in ("sm_80", "sm_86", "sm_100", "gfx942")}
    options = COMPILER_OPTIONS | {"enable_fp_fusion": False}
    for module, name, value in (
        (keys, "COMPILER_OPTIONS", options),
        (offline, "TRITON_VERSION", "3.99.0"),
        # what the environment tells the compilers, and the code that reads the binary
        (keys, "get_cache_invalidating_env_vars", lambda: {"TRITON_F32_DEFAULT": "ieee"}),
        (keys, "_reader", lambda: "another"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            keys._compilers.cache_clear()
            seen.add(binary_key(case, "sm_80"))
    keys._compilers.cache_clear()
    assert len(seen) == 4 + 4


# compiling is not possible where triton has been imported for interpreting, nor is its own search
COMPARED = """
from fastgpt2.kernels import report
from fastgpt2.kernels.jit.binary_key import sources
kernels = {c.kernel for m in report.kernel_modules() for c in report.cases_of(m, "sm_90").values()}
for kernel in kernels:
    assert kernel.cache_key
    for name, _ in kernel.used_global_vals:
        assert f": {name} = " in sources(kernel), f"{kernel}: {name}"
print(len(kernels), sum(len(kernel.used_global_vals) for kernel in kernels))
"""


def test_no_constant_escapes_a_binarys_key() -> None:
    done = run_compiling("-c", COMPARED)
    assert done.returncode == 0, done.stderr
    kernels, constants = map(int, done.stdout.split())
    assert kernels >= 20 and constants > 10
