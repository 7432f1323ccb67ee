"""Training of GPT-2 models."""
