"""Problems whose solution or whose constants are known, and one that is real."""

from h2tune_jax.study.problems.partial import partial
from h2tune_jax.study.problems.quadratic import quadratic
from h2tune_jax.study.problems.sensing import sensing
from h2tune_jax.study.problems.transformer import transformer

__all__ = ["partial", "quadratic", "sensing", "transformer"]
