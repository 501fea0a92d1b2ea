"""Fused Triton kernels for the sparse triple-matrix product, with a plain XLA path beside them."""
