"""``python -m docs.walkthrough.build``: execute the scripts, write the pages and the notebooks.

Every number, text and picture in them comes from this run. Run it from the top of the repository.
Given names of pages it makes these alone; ``13-the-verdict``, which trains GPT-2 124M, only then.
A script that makes ``records``, a list of dictionaries, has them beside its page as JSON Lines.
"""

import argparse
import base64
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import matplotlib
from tqdm import tqdm

from docs.walkthrough.cells import Cell, execute, read_cells
from fastgpt2.cli import Parser
from fastgpt2.cli import run as run_command
from fastgpt2.errors import UserError
from fastgpt2.files import atomic_path, write_text

HERE = Path(__file__).parent
NOTEBOOKS = HERE.parent / "notebooks"
IMAGES = "images"
# the page that takes long, made when it is asked for by name
FULL_SIZE = "13-the-verdict"

INTRODUCTION = """\
# From a dot product to GPT-2

Each page climbs one rung of [`fastgpt2.ladder`](../../fastgpt2/ladder/__init__.py): short modules,
each tested against the next. The same pages as Jupyter notebooks are in
[`docs/notebooks`](../notebooks). `python -m docs.walkthrough.build` executes the scripts in
[`sources`](sources) and writes both; nothing in them is typed by hand.
"""


def sources() -> list[Path]:
    """The scripts in the order they are read."""
    return sorted((HERE / "sources").glob("[0-9][0-9]_*.py"))


def page_name(source: Path) -> str:
    """``04_self_attention.py`` -> ``04-self-attention``."""
    return source.stem.replace("_", "-")


def title(cells: list[Cell]) -> str:
    """The heading of the first cell."""
    return cells[0].source.splitlines()[0].removeprefix("# ")


def build(
    pages: Path,
    notebooks: Path,
    parameters: Mapping[str, object] | None = None,
    chosen: Collection[str] = (),
) -> None:
    """Execute the scripts and write their pages and notebooks.

    Args:
        pages: folder for the Markdown pages and, below it, their pictures.
        notebooks: folder for the notebooks.
        parameters: smaller numbers for a quick run, by the names in the ``parameters`` cells.
        chosen: names of the pages to make; none means all but ``FULL_SIZE``.

    Raises:
        UserError: there is no such page.
    """
    matplotlib.use("Agg")
    for folder in (pages / IMAGES, notebooks):
        folder.mkdir(parents=True, exist_ok=True)
    all_cells = {page_name(source): read_cells(source) for source in sources()}
    names = list(all_cells)
    for name in chosen:
        if name not in names:
            raise UserError(f"no page {name!r}; there are {', '.join(names)}")
    for i, (name, cells) in enumerate(tqdm(all_cells.items(), desc="pages", disable=None)):
        if name not in (chosen or set(names) - {FULL_SIZE}):
            continue
        records = execute(cells, parameters).get("records")
        if records is not None:
            lines = "".join(json.dumps(record) + "\n" for record in records)
            write_text(pages / f"{name}.jsonl", lines)
        for cell in cells:
            for picture in cell.pictures:
                with atomic_path(pages / IMAGES / f"{name}-{picture.name}.png") as path:
                    path.write_bytes(picture.png)
        links = ["[contents](README.md)"]
        links += [f"before: [{title(all_cells[n])}]({n}.md)" for n in names[i - 1 : i]]
        links += [f"next: [{title(all_cells[n])}]({n}.md)" for n in names[i + 1 : i + 2]]
        write_text(pages / f"{name}.md", to_markdown(name, cells) + " · ".join(links) + "\n")
        write_text(
            notebooks / f"{name}.ipynb", json.dumps(to_notebook(name, cells), indent=1) + "\n"
        )
    contents = [
        f"{i}. [{title(cells)}]({name}.md)" for i, (name, cells) in enumerate(all_cells.items(), 1)
    ]
    write_text(pages / "README.md", "\n".join([INTRODUCTION, *contents, ""]))


def to_markdown(name: str, cells: list[Cell]) -> str:
    """The page of executed ``cells``."""
    parts = []
    for cell in cells:
        if cell.kind == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        shown = cell.printed + (cell.value or "")
        if shown.lstrip().startswith("|"):
            # a table stays a table
            parts.append(shown.strip())
        elif shown.strip():
            parts.append(f"```text\n{shown.rstrip()}\n```")
        for picture in cell.pictures:
            alt = picture.name.replace("-", " ")
            parts.append(f"![{alt}]({IMAGES}/{name}-{picture.name}.png)")
    return "\n\n".join([*parts, ""]) + "\n"


def to_notebook(name: str, cells: list[Cell]) -> dict[str, Any]:
    """The same as a notebook of format 4.5, outputs included."""
    return {
        "cells": [_notebook_cell(f"{name}-{i}", cell, i) for i, cell in enumerate(cells)],
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def _notebook_cell(id_: str, cell: Cell, count: int) -> dict[str, Any]:
    common = {
        "cell_type": cell.kind,
        "id": id_,
        "metadata": {"tags": ["parameters"]} if cell.is_parameters else {},
        "source": cell.source.splitlines(keepends=True),
    }
    if cell.kind == "markdown":
        return common
    outputs: list[dict[str, Any]] = []
    if cell.printed:
        text = cell.printed.splitlines(keepends=True)
        outputs.append({"output_type": "stream", "name": "stdout", "text": text})
    if cell.value is not None:
        data: dict[str, Any] = {"text/plain": cell.value.splitlines(keepends=True)}
        result = {"output_type": "execute_result", "execution_count": count}
        outputs.append({**result, "data": data, "metadata": {}})
    for picture in cell.pictures:
        data = {"image/png": base64.b64encode(picture.png).decode("ascii")}
        outputs.append({"output_type": "display_data", "data": data, "metadata": {}})
    return {**common, "execution_count": count, "outputs": outputs}


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = Parser(prog="docs.walkthrough.build", description="Build the pages and notebooks.")
    parser.add_argument("--pages", type=Path, default=HERE, metavar="DIR", help="[%(default)s]")
    parser.add_argument(
        "--notebooks", type=Path, default=NOTEBOOKS, metavar="DIR", help="[%(default)s]"
    )
    parser.add_argument(
        "chosen",
        nargs="*",
        metavar="PAGE",
        help=f"pages to make, such as 10-training [all but {FULL_SIZE}, which trains GPT-2 124M]",
    )
    return run_command("walkthrough", lambda: _build(parser.parse_args(argv)))


def _build(arguments: argparse.Namespace) -> None:
    build(arguments.pages, arguments.notebooks, chosen=arguments.chosen)


if __name__ == "__main__":
    raise SystemExit(main())
