"""Studies of methods: convergence rates, held against what a theorem claims.

`python -m h2tune_jax.study.convergence` runs them; `docs/convergence.md` explains what is measured.
"""
