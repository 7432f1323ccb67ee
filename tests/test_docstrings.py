"""Public functions say what their arguments are: a reader never has to look into the code."""

import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest

# what a program imports: the drop-ins, the kernels, generation, weights, text, the training step
SURFACE = (
    "fastgpt2",
    "fastgpt2.kernels",
    "fastgpt2.generate",
    "fastgpt2.weights",
    "fastgpt2.text",
    "fastgpt2.opener",
    "fastgpt2.runs",
    "fastgpt2.distributed",
    "fastgpt2.peers",
    "fastgpt2.train.step",
    "fastgpt2.train.validation",
)


def _functions(module_name: str) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Public functions, and the public methods and the ``__call__`` of public classes."""
    module = importlib.import_module(module_name)
    names = getattr(module, "__all__", None) or [
        name for name, x in vars(module).items() if getattr(x, "__module__", "") == module_name
    ]
    for name in names:
        thing = getattr(module, name)
        if name.startswith("_") or not getattr(thing, "__module__", "").startswith("fastgpt2"):
            continue
        if inspect.isclass(thing):
            for method, function in inspect.getmembers(thing, inspect.isfunction):
                ours = function.__module__.startswith("fastgpt2")
                if ours and (method == "__call__" or method[0] != "_"):
                    yield f"{module_name}.{name}.{method}", function
        elif inspect.isfunction(thing):
            yield f"{module_name}.{name}", thing


FUNCTIONS = dict(pair for module in SURFACE for pair in _functions(module))


def test_the_walk_finds_the_surface() -> None:
    for name in (
        "fastgpt2.kernels.attention",
        "fastgpt2.GPT.generate",
        "fastgpt2.train.step.TrainingStep.__call__",
        "fastgpt2.opener.open_model",
    ):
        assert name in FUNCTIONS
    assert len(FUNCTIONS) > 60


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_docstring_names_every_argument(name: str) -> None:
    function = FUNCTIONS[name]
    text = inspect.getdoc(function) or ""
    assert text, "no docstring"
    arguments = [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.name not in ("self", "cls")
        and parameter.name[0] != "_"
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    missing = [argument for argument in arguments if argument not in text]
    assert not missing, f"{', '.join(missing)}: not in the docstring"
