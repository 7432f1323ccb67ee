"""``python -m tools.rival FILE --kernel NAME ...``: a rival's Triton kernel in our kernels' report.

Compiles one kernel of the file for sm_90, without a GPU, and prints its row of the report, then
the rows of our kernels whose name contains ``--beside``. The file's imports must work: ``--path``
adds a folder, such as one filled by ``pip install --target``. The file is imported, which runs
code: use files that you trust.

    python -m tools.rival liger_kernel/ops/cross_entropy.py --path FOLDER \\
        --kernel liger_cross_entropy_kernel --argument 'X_ptr=*bf16' --argument 'n_cols=i32' \\
        --argument BLOCK_SIZE=:32768 --warps 32 --turn 32768 --beside 'cross_entropy_fwd'
"""

import argparse
import ast
import importlib.util
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from fastgpt2 import cli
from fastgpt2.errors import UserError
from fastgpt2.kernels import report
from fastgpt2.kernels.cases import CompileCase, Work
from fastgpt2.kernels.gpus import GPUS
from fastgpt2.kernels.report_rows import HEAD, Row, format_row

ARCH, GPU = "sm_90", GPUS["h200"]


def load_kernel(file: Path, name: str) -> Any:
    """The ``@triton.jit`` function of that name, without its autotuner and heuristics.

    Raises:
        UserError: the file cannot be imported, or has no such kernel.
    """
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise UserError(f"{file}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{file}: cannot be imported: {type(error).__name__}: {error}") from None
    kernel = getattr(module, name, None)
    # decorators keep the decorated kernel in `fn`; a kernel keeps its Python function there, too
    while kernel is not None and not hasattr(kernel, "cache_key"):
        kernel = getattr(kernel, "fn", None)
    if kernel is None:
        raise UserError(f"{file}: has no Triton kernel {name!r}")
    return kernel


def parse_arguments(kernel: Any, given: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(signature, constants) from ``name=type`` and ``name=:value``; others are None.

    Raises:
        UserError: a name is not one of the kernel's, or a value is not a Python literal.
    """
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or name not in kernel.arg_names:
            known = ", ".join(kernel.arg_names)
            raise UserError(f"--argument {text}: must be NAME=TYPE or NAME=:VALUE, NAME of {known}")
        if value.startswith(":"):
            try:
                constants[name] = ast.literal_eval(value[1:])
            except (ValueError, SyntaxError):
                raise UserError(f"--argument {text}: {value[1:]!r} is not a Python value") from None
        else:
            types[name] = value
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    missing = {name: None for name in kernel.arg_names if name not in types}
    return signature, missing | constants


def rival_row(options: argparse.Namespace) -> Row:
    """The rival's row, compiled now."""
    from fastgpt2.kernels.jit.compile import compile_case

    kernel = load_kernel(options.file, options.kernel)
    signature, constants = parse_arguments(kernel, options.argument)
    divisible = [n for n, kind in signature.items() if kind.startswith(("*", "i"))]
    case = CompileCase(
        kernel=kernel,
        name=options.kernel,
        config=f"w{options.warps} s{options.stages}",
        signature=signature,
        constexprs=constants,
        num_warps=options.warps,
        num_stages=options.stages,
        divisible_by_16=tuple(n for n in divisible if n not in options.odd),
        wants_mma=False,
        flops=0.0,
        bytes=0.0,
        work=Work(1.0, unit="tile") if options.turn is None else Work(options.turn, options.turn),
    )
    try:
        found = compile_case(case, ARCH)
    except Exception as error:
        last = str(error).strip().splitlines()[-1:]
        raise UserError(f"{options.kernel}: does not compile: {' '.join(last)}") from None
    return Row.of(case, ARCH, vars(found))


def own_rows(text: str) -> list[Row]:
    """Our rows on the same architecture whose kernel and config hold ``text``."""
    tasks = report.tasks_of(report.kernel_modules(), [ARCH])
    wanted = [task for task in tasks if text in f"{task.kernel} {task.config}"]
    recorded = report.expectation_file(metadata.version("triton"))
    return report.measure(wanted, 1, report.read_expectation(recorded))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = cli.Parser(
        prog="python -m tools.rival",
        description="Compile a rival's Triton kernel for sm_90 and print its row beside ours.",
    )
    parser.add_argument("file", type=Path, help="Python file with the rival's kernel")
    parser.add_argument("--kernel", required=True, help="name of the kernel in that file")
    parser.add_argument("--path", type=Path, help="folder to import the file's imports from")
    parser.add_argument(
        "--argument",
        action="append",
        default=[],
        metavar="NAME=TYPE|NAME=:VALUE",
        help="type (*bf16, i32, fp32) or constant of an argument, None by default; repeatable",
    )
    parser.add_argument(
        "--odd",
        action="append",
        default=[],
        help="argument that is not a multiple of 16; repeatable",
    )
    parser.add_argument("--warps", type=int, default=4, help="warps per block [%(default)s]")
    parser.add_argument("--stages", type=int, default=3, help="pipeline stages [%(default)s]")
    parser.add_argument(
        "--turn", type=int, help="elements per block and turn of its loop [count per tile]"
    )
    parser.add_argument(
        "--beside", help="also print our kernels whose name or config contains this text"
    )
    options = parser.parse_args(arguments)

    def body() -> int:
        if options.path is not None:
            sys.path.insert(0, str(options.path))
        rows = [rival_row(options)]
        rows += own_rows(options.beside) if options.beside else []
        print("\n".join([*HEAD, *(format_row(row, GPU) for row in rows)]))
        return 0

    return cli.run("tools.rival", body)


if __name__ == "__main__":
    sys.exit(main())
