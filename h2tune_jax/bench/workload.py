"""From a case to what a round needs: a method, a cohort, its frozen base and its data."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import h2tune_jax as h2
from h2tune_jax.bench.cases import Case
from h2tune_jax.bench.flops import lora_flops, mlp_flops
from h2tune_jax.types import ClientData, CohortSpec, FederationError, PyTree, fold_name

INPUTS, HIDDEN, CLASSES = 784, 128, 62  # of the MLP
LABELS = 6  # of a classifier on a language model
TARGETS = ("q", "v")
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": LLAMA
    | {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 8192,
    },
    "llama-3.2-3b": LLAMA
    | {
        "hidden_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 8192,
    },
    "tiny": {
        "model_type": "bert",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "vocab_size": 500,
        "max_position_embeddings": 64,
    },
}


class Unavailable(FederationError):
    """The case cannot be measured here; the message is the reason that is printed."""


class Workload(NamedTuple):
    """A round's ingredients. Arrays are made by functions, so that their shapes can be looked at first."""

    method: h2.FederatedMethod
    spec: CohortSpec
    base_shapes: PyTree  # of jax.ShapeDtypeStruct
    make_base: Callable[[], PyTree]
    data_shapes: ClientData
    make_data: Callable[[], ClientData]
    flops: int  # of a round
    weights: str  # "real", "random" or "trained" (the MLP has no frozen weights)

    @property
    def specs(self) -> tuple[CohortSpec]:
        return (self.spec,)


def build(case: Case) -> Workload:
    """Build a case's workload, allocating nothing but the real weights of small models."""
    return _mlp(case) if case.model == "mlp" else _language_model(case)


def count_tokens(data: ClientData) -> int | None:
    """Count the tokens that the masks let through; None where examples are no texts."""
    mask = data.examples.get("attention_mask")
    return None if mask is None else int(np.asarray(mask).sum(dtype=np.int64))


# --- the MLP ---------------------------------------------------------------------------------------


def _mlp(case: Case) -> Workload:
    def init(key):
        one, two = jax.random.split(key)
        return {
            "w1": 0.03 * jax.random.normal(one, (INPUTS, HIDDEN)),
            "b1": jnp.zeros(HIDDEN),
            "w2": 0.08 * jax.random.normal(two, (HIDDEN, CLASSES)),
            "b2": jnp.zeros(CLASSES),
        }

    def loss_fn(adapters, base, batch, key):
        p, x, y = adapters.head, batch.examples["x"], batch.examples["y"]
        hidden = jax.nn.relu(x @ p["w1"] + p["b1"][None, :])
        logits = jax.nn.log_softmax(hidden @ p["w2"] + p["b2"][None, :])
        losses = -jnp.take_along_axis(logits, y[:, None], axis=1)[:, 0]
        mask = batch.mask.astype(losses.dtype)
        return (losses * mask).sum() / mask.sum(), {}

    if case.dtype != "float32":
        raise Unavailable("the mlp is measured in float32 only")
    examples = case.batch * case.steps
    spec = CohortSpec(
        name="mlp",
        num_clients=case.clients,
        model=h2.ModelSpec(num_layers=1, sites={}),
        rank=1,
        loss_fn=loss_fn,
        init_head_fn=init,
        budget=h2.Budget(batch_size=case.batch, epochs=1),
    )
    lead = (case.clients, examples)
    shapes = {
        "x": jax.ShapeDtypeStruct((*lead, INPUTS), jnp.float32),
        "y": jax.ShapeDtypeStruct(lead, jnp.int32),
    }

    def make_data() -> ClientData:
        rng = np.random.default_rng(0)
        x = rng.standard_normal((*lead, INPUTS), np.float32)
        y = rng.integers(0, CLASSES, lead, np.int32)
        return _on_device({"x": x, "y": y}, lead)

    return Workload(
        method=h2.fedavg(learning_rate=0.1),
        spec=spec,
        base_shapes=(),
        make_base=lambda: (),
        data_shapes=_shapes(shapes, lead),
        make_data=make_data,
        flops=case.clients * mlp_flops(examples, INPUTS, HIDDEN, CLASSES),
        weights="trained",
    )


# --- language models -------------------------------------------------------------------------------


def _language_model(case: Case) -> Workload:
    from h2tune_jax import models, tasks
    from h2tune_jax.methods.fedit import fedit
    from h2tune_jax.models.model import base_shapes

    if case.kernels == "triton":
        _need_triton()
    if case.model in SHAPES:
        choices = {"dtype": case.dtype}
        if SHAPES[case.model]["model_type"] == "bert":
            choices["pooling"] = "mean"
        model = models.build(models.config_from_hf(SHAPES[case.model], **choices))
        as_stored = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(case.dtype))
        shapes = jax.tree.map(as_stored, base_shapes(model.config))
        make_base, weights = lambda: _random_base(shapes), "random"
    else:
        model, base = _load(case)
        shapes = jax.eval_shape(lambda: base)
        make_base, weights = lambda: base, "real"

    causal = case.model in ("smollm2", "llama-3.2-1b", "llama-3.2-3b")
    task = "causal_lm" if causal else "classification"
    spec = CohortSpec(
        name=case.model,
        num_clients=case.clients,
        model=model.spec,
        rank=case.rank,
        loss_fn=tasks.make_loss_fn(tasks.forward_of(model, task), task),
        init_head_fn=None if causal else model.init_head_fn(LABELS),
        targets=TARGETS,
        kernels="triton" if case.kernels == "triton" else "xla",
        budget=h2.Budget(batch_size=case.batch, epochs=1),
    )
    alternating = case.method == "h2tune"
    lead = (case.clients, case.batch * case.steps)
    texts = (*lead, case.length)
    config = model.config
    return Workload(
        # Without a warm start every round costs the same.
        method=h2.h2tune(warmup_rounds=0) if alternating else fedit(),
        spec=spec,
        base_shapes=shapes,
        make_base=make_base,
        data_shapes=_shapes(_text_shapes(texts, causal), lead),
        make_data=lambda: _on_device(_texts(texts, causal, config.vocab_size), lead),
        flops=case.clients
        * lora_flops(
            case,
            sites=model.spec.shapes,
            targets=TARGETS,
            num_layers=config.num_layers,
            attention_width=config.num_heads * config.head_dim,
            outputs=(config.width, config.vocab_size if causal else LABELS),
            causal=causal,
            passes=2 if alternating else 1,
        ),
        weights=weights,
    )


def _need_triton() -> None:
    from h2tune_kernels import launch

    if jax.default_backend() != "gpu":
        raise Unavailable("the Triton kernels run on a CUDA device only")
    if not launch.available():
        raise Unavailable("jax-triton cannot be imported (the extras cuda12 and cuda13 bring it)")


def _load(case: Case) -> tuple[Any, PyTree]:
    from h2tune_jax import models
    from h2tune_jax.tasks import assets

    folder = assets.find_root() / case.model
    if not (folder / assets.MANIFEST).is_file():
        raise Unavailable(f"the real weights are not there: `make assets` fetches {case.model}")
    if case.model == "minilm":
        return models.load_hf(folder, pooling="mean", dtype=case.dtype)
    try:
        file = folder / "SmolLM2-135M-Instruct.Q4_1.gguf"
        return models.load_gguf(file, dtype=case.dtype)
    except ImportError as error:
        raise Unavailable("reading GGUF weights needs the extra `data`") from error


def _random_base(shapes: PyTree) -> PyTree:
    """Draw weights leaf by leaf, so that no second copy of the model exists; norms start at 1."""

    def draw(path, leaf):
        names = [str(getattr(key, "key", key)) for key in path]
        if any("norm" in name for name in names) and names[-1] == "w":
            return jnp.ones(leaf.shape, leaf.dtype)
        key = fold_name(jax.random.key(0), jax.tree_util.keystr(path))
        return _draw(key, leaf.shape, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def _draw_leaf(key, shape, dtype):
    return jax.random.uniform(key, shape, dtype, -0.03, 0.03)


_draw = jax.jit(_draw_leaf, static_argnums=(1, 2))


def _text_shapes(texts: tuple[int, ...], causal: bool) -> dict[str, jax.ShapeDtypeStruct]:
    shapes = {name: jax.ShapeDtypeStruct(texts, jnp.int32) for name in _TOKENS}
    if causal:
        return {**shapes, "answer_mask": jax.ShapeDtypeStruct(texts, jnp.bool_)}
    return {**shapes, "labels": jax.ShapeDtypeStruct(texts[:-1], jnp.int32)}


_TOKENS = ("input_ids", "attention_mask")


def _texts(texts: tuple[int, ...], causal: bool, vocabulary: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, vocabulary, texts, np.int32)
    examples = {"input_ids": ids, "attention_mask": np.ones(texts, np.int32)}
    if causal:
        return {**examples, "answer_mask": np.ones(texts, bool)}
    return {**examples, "labels": rng.integers(0, LABELS, texts[:-1], np.int32)}


def _shapes(examples: dict, lead: tuple[int, int]) -> ClientData:
    counts: Any = jax.ShapeDtypeStruct(lead[:1], jnp.int32)
    return ClientData(examples, counts)


def _on_device(examples: dict, lead: tuple[int, int]) -> ClientData:
    counts = np.full(lead[0], lead[1], np.int32)
    return ClientData(jax.device_put(examples), jax.device_put(counts))
