"""Settings for all kernel tests, and a process in which Triton interprets."""

import concurrent.futures
import multiprocessing
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import kernel_checks
import pytest


@pytest.fixture(autouse=True)
def _strict() -> Iterator[None]:
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Callable[..., Any]]:
    """Call a function of kernel_checks in a process with TRITON_INTERPRET=1.

    The variable has to stand before Triton is imported and would break ahead-of-time compilation
    in the same process, so it is set in a process of its own, once per session.
    """
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(
        1, mp_context=context, initializer=kernel_checks.use_interpreter
    )

    def call(fn: Callable[..., Any], *args: Any) -> Any:
        return pool.submit(fn, *args).result()

    with pool:
        yield call
    assert "TRITON_INTERPRET" not in os.environ
