"""GPT-2 weights in every format people keep them in: readers, writers, downloads."""
