"""The Triton kernels: the only folder that imports triton, imported inside op bodies only."""
