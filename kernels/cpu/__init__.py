"""Kernels for a processor, in C++, and what compiles them on the machine where they run."""
