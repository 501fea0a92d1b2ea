"""Fused Triton kernels for the sparse triple-matrix product, with a plain XLA path beside them."""

from h2tune_kernels.core import scatter_core, scatter_core_ref, sparse_core, sparse_core_ref
from h2tune_kernels.dispatch import Kernels
from h2tune_kernels.triple import (
    MAX_RANK,
    triple_matmul,
    triple_matmul_ref,
    triple_matmul_sparse,
    triple_matmul_sparse_ref,
)

__all__ = [
    "MAX_RANK",
    "Kernels",
    "scatter_core",
    "scatter_core_ref",
    "sparse_core",
    "sparse_core_ref",
    "triple_matmul",
    "triple_matmul_ref",
    "triple_matmul_sparse",
    "triple_matmul_sparse_ref",
]
