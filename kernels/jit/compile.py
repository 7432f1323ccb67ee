"""Compile a kernel for a GPU that the machine does not have, and read what the binary needs.

Triton's compiler, ptxas, nvdisasm and cuobjdump all ship in the wheel and need no device, so
registers, spills, shared memory and tensor-core instructions are known on any machine. Not under
``TRITON_INTERPRET=1``: there the kernels are plain Python functions.
"""

import contextlib
import io
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastgpt2.kernels.cases import CompileCase
from fastgpt2.kernels.gpus import ARCHITECTURES
from fastgpt2.kernels.jit.launch import COMPILER_OPTIONS
from fastgpt2.kernels.machine_code import SPLIT, count_loops

TRITON_VERSION: str = triton.__version__

TARGETS = {
    name: GPUTarget("hip", name, chip.warp)
    if name.startswith("gfx")
    else GPUTarget("cuda", int(name.removeprefix("sm_")), chip.warp)
    for name, chip in ARCHITECTURES.items()
}

# tensor-core opcodes as the disassembler spells them; "-rs" is a wgmma with its first operand in
# registers, which ptxas before 13.1 may overwrite too early (triton-lang/triton#11781)
_NVIDIA_MMA = (
    ("tcgen05", re.compile(r"\bUTC[A-Z]*MMA")),
    ("wgmma-rs", re.compile(r"\b[HQI]GMMA\S* R\d+, R\d+,")),
    ("wgmma", re.compile(r"\b[HQI]GMMA\b")),
    ("mma.sync", re.compile(r"\b[HQI]MMA\b")),
)
_NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Resources:
    """What one thread (registers, spills) and one block (shared memory) of a binary need.

    Attributes:
        registers: per thread; vector registers on AMD.
        spill_bytes: per thread, of the stack frame on NVIDIA, of scratch memory on AMD.
        shared_bytes: per block.
        mma: ``tcgen05``, ``wgmma`` (``wgmma-rs`` if any takes its first operand from registers),
            ``mma.sync``, ``mfma`` or ``wmma`` on AMD, or empty without tensor cores.
        serialized: whether ptxas waits after every wgmma instead of overlapping them.
        units: instructions of the loops by the unit that executes them, per warp; NVIDIA only.
        skipped: how many of those a branch may skip.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    mma: str
    serialized: bool
    units: dict[str, int]
    skipped: int


def _constant_paths(case: CompileCase) -> dict[tuple[int, ...], Any]:
    """Triton's constants: (argument index, element index) -> value."""
    constants = {}
    for i, (name, kind) in enumerate(case.signature.items()):
        if isinstance(kind, tuple):
            constants |= {(i, j): 1 for j, part in enumerate(kind) if part == "constexpr"}
        elif kind == "constexpr":
            constants[i,] = case.constexprs[name]
    return constants


def _divisible_paths(case: CompileCase) -> list[tuple[int, ...]]:
    """Index paths of the arguments, or elements of tuples, that are multiples of 16."""
    names = list(case.signature)
    paths: list[tuple[int, ...]] = []
    for entry in case.divisible_by_16:
        name, _, element = entry.partition(".")
        i, kind = names.index(name), case.signature[name]
        if element:
            paths.append((i, int(element)))
        elif isinstance(kind, tuple):
            paths += [(i, j) for j, part in enumerate(kind) if part != "constexpr"]
        else:
            paths.append((i,))
    return paths


def _source(case: CompileCase) -> ASTSource:
    expected = list(case.kernel.arg_names)
    if list(case.signature) != expected:
        raise ValueError(
            f"{case.name}: the signature must name the kernel's arguments {expected} in order, "
            f"got {list(case.signature)}"
        )
    attrs = {path: [["tt.divisibility", 16]] for path in _divisible_paths(case)}
    return ASTSource(case.kernel, case.signature, _constant_paths(case), attrs)


def _run_tool(tool: str, *arguments: str) -> str:
    command = [str(_NVIDIA_TOOLS / tool), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _nvidia_resources(compiled: Any, assembler_log: str) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _run_tool("cuobjdump", "-res-usage", cubin.name)
        sass = _run_tool("nvdisasm", "-c", cubin.name)
    loops = count_loops(sass)
    counts = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Resources(
        registers=counts["REG"],
        spill_bytes=counts["STACK"] + counts["LOCAL"],
        shared_bytes=compiled.metadata.shared,
        mma=next((kind for kind, opcode in _NVIDIA_MMA if opcode.search(sass)), ""),
        serialized="wgmma.mma_async instructions are serialized" in assembler_log,
        units={unit: sum(loop.units.get(unit, 0) for loop in loops) for unit in SPLIT},
        skipped=sum(loop.skipped for loop in loops),
    )


def _amd_resources(compiled: Any) -> Resources:
    assembly = compiled.asm["amdgcn"]
    counts = {
        key: int(value)
        for key, value in re.findall(
            r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size): +(\d+)", assembly
        )
    }
    return Resources(
        registers=counts["vgpr_count"],
        spill_bytes=max(counts["private_segment_fixed_size"], 4 * counts["vgpr_spill_count"]),
        shared_bytes=compiled.metadata.shared,
        mma=next((kind for kind in ("mfma", "wmma") if f"v_{kind}" in assembly), ""),
        serialized=False,
        units={},
        skipped=0,
    )


def compile_case(case: CompileCase, arch: str) -> Resources:
    """Build ``case`` for one of ``TARGETS``, say ``sm_90``, and read what the binary needs.

    Raises:
        RuntimeError: under ``TRITON_INTERPRET=1``.
        ValueError: the signature does not name the kernel's arguments in order.
    """
    if not isinstance(case.kernel, triton.JITFunction):
        raise RuntimeError("kernels cannot be compiled under TRITON_INTERPRET=1: unset it")
    shape = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    options = shape | COMPILER_OPTIONS
    log = io.StringIO()
    # a cached binary would come without the assembler's log, which Triton prints
    with (
        knobs.compilation.scope(),
        knobs.nvidia.scope(),
        contextlib.redirect_stdout(log),
    ):
        knobs.compilation.always_compile = True
        knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(_source(case), target=TARGETS[arch], options=options)
    if arch.startswith("gfx"):
        return _amd_resources(compiled)
    return _nvidia_resources(compiled, log.getvalue())
