"""Products that are to keep their digits."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

P = ParamSpec("P")
R = TypeVar("R")


def exact(function: Callable[P, R]) -> Callable[P, R]:
    """Compute a function's products in full precision.

    By default recent GPUs multiply float32 in TF32, which keeps 10 of 23 bits, and TPUs in bfloat16: good
    enough for a step of training, and not for a mean, a factorisation or a sum that is kept for ever.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.default_matmul_precision("highest"):
            return function(*args, **kwargs)

    return call
