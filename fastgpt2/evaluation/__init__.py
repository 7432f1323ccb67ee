"""How good a model is: cross-entropy of a text, HellaSwag, LAMBADA, and a report."""
