"""Launches in Triton's interpreter: the kernels' own code, run by numpy on the CPU, for tests.

Set TRITON_INTERPRET=1 before Triton is imported. Outputs start as NaN, so that an element which no
program writes shows. The interpreter's product of bfloat16 operands is wrong: kernels get UPCAST.
"""

from typing import Any

import jax
import ml_dtypes
import numpy as np

from h2tune_kernels.launch import Launch

__all__ = ["counts", "interpreter_launcher"]

# Launches so far by kernel name: what a test looks at to see that the kernel ran.
counts: dict[str, int] = {}


class _Storage:
    """The part of torch's untyped storage that the interpreter calls."""

    def __init__(self, array: np.ndarray):
        self.array = array

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def cpu(self) -> "_Storage":
        return self

    def copy_(self, other: "_Storage") -> None:
        """Nothing to copy: host and device are one."""


class _Tensor:
    """The part of a torch tensor that the interpreter calls, over a numpy array."""

    def __init__(self, array: np.ndarray, name: str):
        self.array = array
        self.dtype = name

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> _Storage:
        return _Storage(self.array)

    def new_empty(self, *_: Any, **__: Any) -> "_Tensor":
        return _Tensor(self.array, self.dtype)

    def set_(self, storage: _Storage, *_: Any) -> None:
        self.array = storage.array

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    def stride(self) -> tuple[int, ...]:
        return tuple(s // self.array.itemsize for s in self.array.strides)

    def element_size(self) -> int:
        return self.array.itemsize


_NAMES = {
    np.dtype(np.float32): "fp32",
    np.dtype(np.float16): "fp16",
    np.dtype(ml_dtypes.bfloat16): "bf16",
    np.dtype(np.int32): "i32",
}


def _run(launch: Launch, *operands: Any) -> tuple[np.ndarray, ...]:
    arrays = [np.array(operand, copy=True, order="C") for operand in operands]
    outputs = []
    for position, shape in enumerate(launch.out_shapes):
        taken = [i for i, o in launch.aliases.items() if o == position]
        if taken:
            outputs.append(arrays[taken[0]])
        else:
            outputs.append(np.full(shape.shape, np.nan, shape.dtype))
    tensors = [_Tensor(array, _NAMES[array.dtype]) for array in (*arrays, *outputs)]
    launch.kernel[launch.grid](*tensors, **launch.constants)
    name = launch.kernel.fn.__name__
    counts[name] = counts.get(name, 0) + 1
    return tuple(outputs)


def interpreter_launcher(launch: Launch, *operands: jax.Array) -> tuple[jax.Array, ...]:
    """Bind a launch as a callback that runs the interpreter."""
    out = jax.pure_callback(lambda *arrays: _run(launch, *arrays), launch.out_shapes, *operands)
    return tuple(out)
