"""Pictures that look the same everywhere, and whose failure never breaks what they show."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from textwrap import shorten
from typing import Any

from fastgpt2.files import atomic_path


def draw(
    path: Path,
    paint: Callable[[], Any],
    *,
    dpi: int = 120,
    notify: Callable[[str], None] = print,
) -> bool:
    """Write a PNG or SVG that ``paint`` draws; say so in one line where that fails.

    The environment's backend and matplotlibrc have no part in it, and a ``$`` in a text stays one.

    Args:
        path: the picture; it is an SVG where the name ends in .svg, else a PNG.
        paint: draws on a ``new_figure`` and returns it.
        dpi: dots per inch.
        notify: shows the line.

    Returns:
        whether the picture was drawn.
    """
    try:
        _draw(path, paint, dpi)
    except Exception as error:
        # whatever it is: the numbers that it shows are worth more than the picture
        reason = shorten(str(error) or type(error).__name__, 200, placeholder=" ...")
        notify(f"{path.name}: not drawn ({reason})")
        return False
    return True


def new_figure(width: float, height: float) -> Any:
    """An empty ``matplotlib.figure.Figure``, in inches; to be called by what ``draw`` is given."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def printable(text: str) -> str:
    """What a font may lack or cannot hold (line breaks, half a character) as escapes."""
    return "".join(
        char if char.isprintable() and ord(char) < 0x2000 else ascii(char)[1:-1] for char in text
    )


def plain_numbers(axes: Any) -> None:
    """Label the logarithmic axes of ``axes`` with numbers such as 1e+06, without mathtext."""
    from matplotlib.ticker import FuncFormatter

    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def short_numbers(axes: Any) -> None:
    """Label the horizontal axis with numbers such as 50k and 1.2M, which do not run together."""
    from matplotlib.ticker import EngFormatter

    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _draw(path: Path, paint: Callable[[], Any], dpi: int) -> None:
    _import_matplotlib()
    from matplotlib import rcParams, style
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with style.context("default"), warnings.catch_warnings():
        # about numbers too large for an axis, or a font without a sign
        warnings.simplefilter("ignore")
        rcParams["text.parse_math"] = False
        figure = paint()
        FigureCanvasAgg(figure)
        with atomic_path(path) as temporary:
            kind = "svg" if path.suffix.lower() == ".svg" else "png"
            figure.savefig(temporary, dpi=dpi, format=kind)


def _import_matplotlib() -> None:
    """Without ``MPLBACKEND``: the name of a backend that is not here ends matplotlib's import."""
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib  # noqa: F401
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
