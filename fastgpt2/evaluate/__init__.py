"""``python -m fastgpt2.evaluate``: how good a model is; ``__main__`` is the command."""
