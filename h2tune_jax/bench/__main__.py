"""`python -m h2tune_jax.bench`."""

import sys

from h2tune_jax.bench.command import main

if __name__ == "__main__":
    sys.exit(main())
