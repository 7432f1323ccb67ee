"""``python -m tools.api``: pdoc's reference of all public modules, from their docstrings.

It is written into ``docs/api/``, which is not committed. A warning of pdoc is an error.
"""

import sys
import warnings
from importlib import import_module
from pathlib import Path

import pdoc
import pdoc.render

MODULES = (
    "fastgpt2",
    "fastgpt2.kernels",
    "fastgpt2.ladder",
    "fastgpt2.model",
    "fastgpt2.text",
    "fastgpt2.weights",
)
FOLDER = Path(__file__).parents[1] / "docs" / "api"


def build(folder: Path, modules: tuple[str, ...] = MODULES) -> None:
    """Write the pages.

    Args:
        folder: where they go.
        modules: the modules; each page shows the module's public names, wherever they are defined.

    Raises:
        Warning: pdoc could not describe something.
    """
    for module in map(import_module, modules):
        # pdoc sees only what has been imported; our public names are imported on first use
        for name in module.__all__ if hasattr(module, "__all__") else ():
            vars(module)[name] = getattr(module, name)
    pdoc.render.configure(docformat="google", show_source=False, math=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pdoc.pdoc(*modules, output_directory=folder)


if __name__ == "__main__":
    build(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
