"""A script cut into cells, the cells executed, what they printed and drew kept.

Scripts are in the "percent" format that editors and Jupytext know: ``# %% [markdown]`` begins a
cell of text written as comments, ``# %%`` one of code. The cell ``# %% parameters`` holds numbers
that a quick run replaces with smaller ones, as papermill does.
"""

import ast
import io
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from cycler import cycler

# what pictures look like; a reader who executes a notebook sees the style of Jupyter instead
STYLE: Any = {
    "figure.dpi": 110,
    "savefig.bbox": "tight",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    # Okabe and Ito's colours, which colour-blind people can tell apart
    "axes.prop_cycle": cycler(color=["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00"]),
    "legend.frameon": False,
    "image.cmap": "viridis",
}


@dataclass(frozen=True)
class Picture:
    """A drawing: its name, which is the figure's label, and the PNG."""

    name: str
    png: bytes


@dataclass
class Cell:
    """A piece of a script, and, once it is executed, what came of it."""

    kind: str
    source: str
    is_parameters: bool = False
    printed: str = ""
    value: str | None = None
    pictures: list[Picture] = field(default_factory=list)


def read_cells(path: Path) -> list[Cell]:
    """The cells of the script at ``path``."""
    cells = []
    for part in ("\n" + path.read_text(encoding="utf-8")).split("\n# %%")[1:]:
        head, _, body = part.partition("\n")
        if head.strip() == "[markdown]":
            lines = [line.removeprefix("#").removeprefix(" ") for line in body.splitlines()]
            cells.append(Cell("markdown", "\n".join(lines).strip()))
        else:
            cells.append(Cell("code", body.strip(), head.strip() == "parameters"))
    return cells


def execute(cells: list[Cell], parameters: Mapping[str, object] | None = None) -> dict[str, Any]:
    """Run the code of ``cells`` in one namespace, as a notebook would, and fill in the results.

    Returns the namespace.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    with plt.rc_context(STYLE):
        for cell in cells:
            if cell.kind == "code":
                _execute(cell, namespace)
            if cell.is_parameters:
                known = {key: v for key, v in (parameters or {}).items() if key in namespace}
                namespace.update(known)
    return namespace


def _execute(cell: Cell, namespace: dict[str, Any]) -> None:
    tree = ast.parse(cell.source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(compile(tree, "<cell>", "exec"), namespace)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), namespace)
            cell.value = None if value is None else repr(value)
    cell.printed = printed.getvalue()
    if plt.get_fignums():
        # the value of a drawing's last line, an object of matplotlib, tells a reader nothing
        cell.value = None
    for number in plt.get_fignums():
        figure = plt.figure(number)
        png = io.BytesIO()
        # no version of matplotlib inside: the same picture is the same file
        figure.savefig(png, format="png", metadata={"Software": None})
        cell.pictures.append(Picture(str(figure.get_label() or f"figure-{number}"), png.getvalue()))
        plt.close(figure)
