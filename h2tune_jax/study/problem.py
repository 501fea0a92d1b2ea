"""What a study runs a method on."""

from typing import Any, NamedTuple

from h2tune_jax.types import Specs


class Problem(NamedTuple):
    """A federation with all its data, and what is known of its solution.

    Attributes:
      name: for tables and plots.
      specs, bases, data: as `make_round` takes them.
      minimum: F at its minimum, where that is known.
      solution: what the minimum is reached at, in the problem's own form, where that is known.
      rows: how many examples of a client gradient norms are taken over at once.
      runs_at_once: how many runs (seeds times constants) are mapped at once at most; None: all.
    """

    name: str
    specs: Specs
    bases: tuple
    data: tuple
    minimum: float | None = None
    solution: Any = None
    rows: int = 64
    runs_at_once: int | None = None
