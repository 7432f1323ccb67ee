"""The walkthrough of ``fastgpt2.ladder``: pages and notebooks made from scripts that run."""
