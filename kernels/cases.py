"""What the compile matrix compiles: a kernel, a config, and a type or a value for each argument."""

from dataclasses import dataclass
from typing import Any

from fastgpt2.kernels.tuning import TABLE, Config

SIZES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Work:
    """How a launch at GPT-2's shape divides into the units that instructions are counted by.

    Attributes:
        units: number in the whole launch: elements, or iterations of the loop over tiles.
        turn: units of a block per iteration of its loop; without a loop, all units of a block.
        grid: blocks launched; None means as many as are resident at a time.
        unit: ``element`` (instructions per thread) or ``tile`` (instructions per warp).
        crossing: tiles that take every branch, such as those on attention's diagonal.
    """

    units: float
    turn: int = 1
    grid: int | None = None
    unit: str = "element"
    crossing: float = 0.0


@dataclass(frozen=True)
class CompileCase:
    """One kernel with one set of tiles and types, as ``compile_case`` builds it.

    Attributes:
        kernel: the ``@triton.jit`` function.
        name: the kernel's name in the report, such as ``attention_fwd``.
        config: a label for tiles and types, such as ``128x64 w8 s3 D64 bf16``; unique within name.
        signature: type of every argument by name: ``"*bf16"``, ``"i32"``, ``"fp32"``,
            ``"constexpr"``, or a tuple of those for a tuple argument. A ``"constexpr"`` inside a
            tuple is a stride of 1, which Triton always specialises on.
        constexprs: value of every ``"constexpr"`` argument.
        num_warps: warps per block.
        num_stages: stages of the software pipeline.
        divisible_by_16: pointers and integers that Triton would see as multiples of 16 at GPT-2's
            shapes; a tuple's name means each of its elements, ``"x_strides.0"`` only that one.
        wants_mma: the kernel is meant to use the tensor cores.
        flops: floating-point operations of the launch at the stated GPT-2 shape.
        bytes: bytes it must move through device memory there.
        work: the units that the instructions are counted by.
        per_sm: blocks that a launch gives each multiprocessor; 0 where it does not count them.
    """

    kernel: Any
    name: str
    config: str
    signature: dict[str, Any]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    divisible_by_16: tuple[str, ...]
    wants_mma: bool
    flops: float
    bytes: float
    work: Work
    per_sm: int = 0


def configs(op: str, arch: str) -> list[tuple[dict[str, int], Config]]:
    """(limits, config) of every rule of ``op`` and every config to compile for ``arch``."""
    return [(dict(rule.limits), config) for rule in TABLE[op] for config in rule.compiled(arch)]


def case(
    kernel: Any,
    name: str,
    config: Config,
    variant: str,
    arguments: dict[str, Any],
    *,
    bytes: float,
    flops: float,
    work: Work,
    wants_mma: bool = False,
    odd: tuple[str, ...] = (),
) -> CompileCase:
    """A ``CompileCase`` at GPT-2's shapes: pointers and most integers are multiples of 16.

    Args:
        kernel: the ``@triton.jit`` function.
        name: the kernel's name in the tuning table.
        config: tiles, warps and stages; its blocks are constants of the kernel.
        variant: what else tells the case apart, such as ``C768 bf16``.
        arguments: by name, a type (``"*bf16"``, ``"i32"``, a tuple of types, where a stride of 1
            is ``"constexpr"``) or the value of a constant, which is anything but a string; None
            stands for an absent tensor.
        bytes: bytes that the launch must move through device memory.
        flops: floating-point operations of the launch.
        work: the units that its instructions are counted by.
        wants_mma: the kernel is meant to use the tensor cores.
        odd: integers that are not multiples of 16, elements of tuples as ``columns.0``.
    """
    values = {**arguments, **dict(config.blocks)}
    typed = {n: v for n, v in values.items() if isinstance(v, str | tuple)}
    constants = {n: v for n, v in values.items() if n not in typed}
    elements = {
        f"{n}.{i}" if isinstance(v, tuple) else n: kind
        for n, v in typed.items()
        for i, kind in enumerate(v if isinstance(v, tuple) else (v,))
    }
    return CompileCase(
        kernel=kernel,
        name=name,
        config=f"{config.label} {variant}",
        signature={n: typed.get(n, "constexpr") for n in kernel.arg_names},
        constexprs=constants,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        divisible_by_16=tuple(
            n for n, kind in elements.items() if kind not in ("fp32", "constexpr") and n not in odd
        ),
        wants_mma=wants_mma,
        flops=flops,
        bytes=bytes,
        work=work,
        per_sm=config.per_sm,
    )
