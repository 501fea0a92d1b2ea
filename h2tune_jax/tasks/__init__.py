"""Tasks: losses, metrics, and data from files to per-client arrays.

The data sets and models that are fetched are apart, in `tasks.assets` and `tasks.corpora`.
"""

from h2tune_jax.tasks.answers import (
    decode_tokens,
    exact_match,
    extract_answer,
    matches,
    normalise_number,
)
from h2tune_jax.tasks.clients import (
    count_holdings,
    format_holdings,
    make_clients,
    plot_holdings,
    stack_clients,
    take_rows,
)
from h2tune_jax.tasks.encoding import (
    Encoded,
    encode_answers,
    encode_choices,
    encode_labels,
    encode_prompts,
    encode_targets,
    encode_texts,
    fill_template,
)
from h2tune_jax.tasks.objective import forward_of, make_evaluate_fn, make_loss_fn
from h2tune_jax.tasks.partition import (
    partition_by_key,
    partition_dirichlet,
    partition_iid,
    partition_pathological,
    split_rows,
)
from h2tune_jax.tasks.programs import ProgramError, evaluate_program
from h2tune_jax.tasks.reading import read_rows
from h2tune_jax.tasks.suites import Prepared, cut_blocks, prepare_glue, prepare_math

__all__ = [
    "Encoded",
    "Prepared",
    "ProgramError",
    "count_holdings",
    "cut_blocks",
    "decode_tokens",
    "encode_answers",
    "encode_choices",
    "encode_labels",
    "encode_prompts",
    "encode_targets",
    "encode_texts",
    "evaluate_program",
    "exact_match",
    "extract_answer",
    "fill_template",
    "format_holdings",
    "forward_of",
    "make_clients",
    "make_evaluate_fn",
    "make_loss_fn",
    "matches",
    "normalise_number",
    "partition_by_key",
    "partition_dirichlet",
    "partition_iid",
    "partition_pathological",
    "plot_holdings",
    "prepare_glue",
    "prepare_math",
    "read_rows",
    "split_rows",
    "stack_clients",
    "take_rows",
]
