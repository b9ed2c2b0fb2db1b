"""The dispatch on a GPU, in Triton kernels."""
