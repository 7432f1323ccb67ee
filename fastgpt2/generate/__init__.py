"""``python -m fastgpt2.generate``: text out of a model; ``__main__`` is the command."""
