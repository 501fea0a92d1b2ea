"""Floating-point operations of a round, counted by formula: a product [m, k] @ [k, n] is 2 m k n.

Counted are matrix products only, each as often as a step needs it:

    MLP, per example       forward 2 (784 h + h v); backward 2 (784 h + h v) for the weights and 2 h v
                           for what enters the second layer
    frozen weight, per token    2 D F forward, 2 D F for the gradient of what enters it
    adapter, per token          2 r (D + F) forward, 4 r (D + F) backward
    attention, per token and layer   4 T w forward (scores and mixing, w = heads x head width; all T
                           positions, masked or not, as they are computed), 8 T w backward
    next-token logits, per token     2 d V forward, 2 d V backward
    classifier, per example          2 d V forward, 4 d V backward

Layers that are computed again in the backward pass count once. Norms, softmax, activations, lookups
and optimisers are not counted. A method that takes two gradients a step counts twice.
"""

from h2tune_jax.bench.cases import Case


def mlp_flops(examples: int, inputs: int, hidden: int, classes: int) -> int:
    """One epoch of full training of a two-layer network."""
    weights = inputs * hidden + hidden * classes
    return 2 * examples * (2 * weights + hidden * classes)


def lora_flops(
    case: Case,
    *,
    sites: dict[str, tuple[int, int]],  # kind -> (D, F) of all frozen weights of a layer
    targets: tuple[str, ...],
    num_layers: int,
    attention_width: int,
    outputs: tuple[int, int],  # (d, V) of the classifier or the next-token logits
    causal: bool,
    passes: int,
) -> int:
    """One round of LoRA training of one client, over all positions of its batches."""
    examples = case.batch * case.steps
    tokens = examples * case.length
    frozen = sum(d * f for d, f in sites.values())
    adapters = sum(case.rank * (sites[kind][0] + sites[kind][1]) for kind in targets)
    attention = case.length * attention_width
    per_token = num_layers * (4 * frozen + 6 * adapters + 12 * attention)
    width, values = outputs
    logits = 4 * tokens * width * values if causal else 6 * examples * width * values
    return passes * (tokens * per_token + logits)
