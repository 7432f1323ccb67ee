"""``python -m fastgpt2.train``: training of GPT-2 models; ``__main__`` is the command."""
