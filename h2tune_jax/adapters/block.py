"""An adapter beside a whole block: y = block(x) + adapter(x).

Methods hand it over as `Adapters.sites["block"]`, beside the kinds of single weights; a model adds it by
calling `beside_block` where a block ends, and knows nothing else of it.
"""

from typing import Any, Protocol

from h2tune_jax.types import Array

BLOCK = "block"
"""Its place in `Adapters.sites`. A pytree; stacked over layers its leaves lead with [Li]."""


class BlockAdapter(Protocol):
    """What a method puts beside a block, one layer of it. `key` switches dropout on."""

    def __call__(self, x: Array, key: Array | None = None) -> Array: ...  # T[..., d] -> T[..., d]


def beside_block(
    x: Array,  # [..., d], what entered the block
    y: Array,  # [..., d], what the block made of it
    adapter: BlockAdapter | Any | None,
    *,
    key: Array | None = None,
) -> Array:
    """Add what the adapter makes of x to y, in the dtype of y; `adapter=None` means none."""
    return y if adapter is None else y + adapter(x, key).astype(y.dtype)
