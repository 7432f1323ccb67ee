"""What an engineer runs by hand: tuning, budgets and histories of the training step, checks."""
