"""Generation of GPT-2 models."""
