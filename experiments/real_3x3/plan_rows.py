"""The rows of the bench: the methods of the field, and the forms of H2Tune."""

from collections.abc import Iterator, Mapping
from typing import Any

from plan_groups import LARGE_PROBE, RANK, SHARD_RANKS, WIDE_PROBE, shard_budgets
from plan_types import RATES, Row

Options = Mapping[str, Any]

HEADS: Options = {"head_rate": 1e-2}

# How a row is to be read, where its name does not say it.
WORDS = {
    "centralised": "the clients of one model and task in one place",
    "hetlora": "without its pruning",
    "fedra": "half of the layers, drawn at random",
    "fed_hello": "half of the layers, drawn by the shape `bottleneck` (RGD)",
    "co_lora": "its factors fitted on 1,024 public texts",
}
BASELINES = {
    name: Row(name, HEADS, WORDS.get(name, ""))
    for name in (
        "centralised", "fedit", "ffa_lora", "fedsa_lora", "hetlora", "flexlora", "flora",
        "fedex_lora", "fedra", "fed_hello", "ce_lora", "co_lora", "heterotune",
    )
}  # fmt: skip
# Its pruning keeps 0.99 of a rank, rounded down: of ranks like these that is an eighth at once, or half.
BASELINES["hetlora"] = BASELINES["hetlora"]._replace(options={**HEADS, "gamma": 1.0})
BASELINES["co_lora"] = BASELINES["co_lora"]._replace(probe=LARGE_PROBE)
BASELINES["co_lora_4096"] = BASELINES["co_lora"]._replace(
    words="the same, on 4,096", probe=WIDE_PROBE
)
LOCAL = {"local": Row("local", HEADS, "no middle matrix: every client a plain LoRA, alone")}
BY_TASK = {
    "local_by_task": LOCAL["local"]._replace(
        words="the same, every task at its own best rate", by_task_of="local"
    )
}
WIDE = {"local_wide": LOCAL["local"]._replace(words="the same with twice the rank", rank=2 * RANK)}

# Written out, so that a row means the same whatever the defaults of the package become.
BETWEEN: Options = {
    "shared_rank": 16,  # twice the rank: so there is something to select
    "num_slots": "none",
    "core": "residual",
    "core_rank": "none",
    "selection": "block",
    "select_at": "download",
    "basis": "random",
    "train_factors": True,
    "g_init": "zero",
    "relation": "depth",
    "train_relation": True,
    "upload": "gradient",
    "alternation": "gauss_seidel",
    "warmup_rounds": 1,
    "sharing": "mean",
    "similarity": "matrices",
    "temperature": 0.5,
    "signature_examples": 16,
    "average": "none",
    "lambda_norm": 1.0,
    "lambda_keep": 1.0,
    "lambda_distil": 1.0,
    "distil_average": "positions",
    "weight_decay": 0.0,
    "optimizer_state": "restart",
}
AS_IN_THE_PAPER: Options = {"selection": "score", "relation": "random", "g_init": "uniform"}
TERMS = {
    "norm": "that keeps the shared part small",
    "keep": "that keeps the core near the last round's",
    "distil": "that keeps the own part near the shared one's answers",
}
SELECTIONS = tuple(
    f"select_{name}" for name in ("block", "score", "score_frozen", "magnitude", "random")
)
# Whose rate a row takes whose parameters mean what that one's do.
BESIDE = {
    **dict.fromkeys(SELECTIONS[1:], SELECTIONS[0]),
    "basis_random_fast": "basis_random",
}
MOMENTUM: Options = {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9}  # in all, steps of 1


def h2tune_row(options: Options, words: str) -> Row:
    return Row("h2tune", {**HEADS, **options}, words)


def forms(common_basis: Options) -> dict[str, Row]:
    """Return H2Tune with a core between own factors, and in a common basis, each shared and alone."""
    paper, common = {**BETWEEN, **AS_IN_THE_PAPER}, {**BETWEEN, **common_basis}
    return {
        "h2tune_paper": h2tune_row(
            paper, "the paper's selection and start of the relation, in our reading"
        ),
        "h2tune": h2tune_row(BETWEEN, "block selection, relation by depth"),
        "h2tune_alone": alone_row(BETWEEN, "h2tune"),
        "h2tune_common": h2tune_row(common, "the form in a common basis")._replace(
            also_at="h2tune_common_alone"
        ),
        "h2tune_common_alone": alone_row(common, "h2tune_common"),
    }


def alone_row(options: Options, name: str) -> Row:
    """Return a row where nothing is shared; it is tested at the rate of the row that shares, too."""
    row = h2tune_row({**options, "sharing": "none"}, "the same, and nothing is shared")
    return row._replace(also_at=name)


def default_form() -> dict[str, Row]:
    """Return changes of the row `h2tune`, whose core stands between a client's own factors."""
    own = RATES[1]
    fast = {**BETWEEN, "learning_rate": own, "shared_rate": 10 * own}
    plain = {"alternation": "joint", **{f"lambda_{term}": "none" for term in TERMS}}
    return {
        "h2tune_fast": h2tune_row(fast, "`h2tune`, the shared part at 10 times the rate"),
        "h2tune_fast_alone": alone_row(fast, "h2tune_fast")._replace(rate_beside="h2tune_fast"),
        "h2tune_joint_alone": h2tune_row(
            {**BETWEEN, **plain, "sharing": "none"},
            "`h2tune_alone`, all parts at once and without terms",
        ),
        "h2tune_seeded": h2tune_row(
            {**BETWEEN, "basis": "seeded"}, "`h2tune`, basis from one seed"
        )._replace(rate_of="h2tune"),
        "h2tune_frozen": h2tune_row(
            {**BETWEEN, "core": "pure", "train_factors": False},
            "`h2tune`, A T B with A and B frozen at random",
        ),
    }


def reference_form() -> dict[str, Row]:
    """Return the settings that the authors' public code states."""
    words = "as the authors' public code states it, but for the rates"
    return {"reference": h2tune_row({"preset": "reference"}, words)}


def ablation(common_basis: Options, name_of_form: str) -> dict[str, Row]:
    """Return the rows that differ from the form in a common basis by one change.

    A change that needs another one has it in its words. What the form has already is left out, so the
    list stays true whatever the form is. Where the parameters keep their meaning a row takes the form's
    rate, and the selections between own factors take that of the first of them.
    """
    best = {**BETWEEN, **common_basis}
    rows = {}
    for name, words, change in _changes(best):
        if {**best, **change} == best:
            continue
        anew = not change.keys().isdisjoint(("core", "basis", "selection"))
        row = h2tune_row({**best, **change}, words)
        if change.get("basis") == "anchored":
            row = row._replace(probe=LARGE_PROBE)
        row = row._replace(rate_beside=BESIDE.get(name))
        rows[name] = row if anew else row._replace(rate_of=name_of_form)
        if row.probe is not None:
            rows[f"{name}_4096"] = row._replace(words="the same, on 4,096", probe=WIDE_PROBE)
    return rows


def _changes(best: Options) -> Iterator[tuple[str, str, Options]]:
    """Give each change as (the row's name, in plain words, options)."""
    mean = {"sharing": "mean"}
    yield "mean", "one mean for all", mean
    yield (
        "by_matrices",
        "a mean for each client, of those with similar matrices",
        {"sharing": "similar", "similarity": "matrices"},
    )
    yield (
        "mean_momentum",
        f"one mean for all, followed with momentum {MOMENTUM['momentum']:g} at the server",
        {**mean, "server_optimizer": MOMENTUM},
    )
    yield "joint", "no alternation: all parts at once", {"alternation": "joint"}
    alternating = {"alternation": "gauss_seidel"}
    terms = {f"lambda_{term}": 1.0 for term in TERMS}
    yield "alternating", "the halves of a step one after the other, without terms", alternating
    yield (
        "alternating_distil",
        "the same, with distillation",
        {**alternating, "lambda_distil": 1.0},
    )
    yield "alternating_terms", "the same, with all three terms", {**alternating, **terms}
    yield (
        "jacobi_terms",
        "both halves from one point, with all three terms",
        {"alternation": "jacobi", **terms},
    )
    yield "with_norm", f"with the term {TERMS['norm']}", {"lambda_norm": 1.0}

    # One rate for all between own factors, where `h2tune_fast` tries ten times that for the core.
    rate = best.get("learning_rate", RATES[1])
    between = {"core_rank": "none", "learning_rate": rate, "shared_rate": rate}
    yield "parallel", "the core beside the own factors", {"core": "parallel"}
    yield (
        "residual",
        "the core between the own factors, A (I + T) B",
        {"core": "residual", **between},
    )
    yield "pure", "the core between the own factors, A T B", {"core": "pure", **between}
    for basis, what in {
        "seeded": "drawn from one seed",
        "anchored": "fitted on 1,024 public texts",
        "singular": "singular vectors of the frozen weights",
    }.items():
        yield f"basis_{basis}", f"basis: {what}", {"basis": basis}
    alone = {"basis": "random", "core": "residual", **between}
    yield "basis_random", "basis: every client's own, A (I + T) B", alone
    yield (
        "basis_random_fast",
        "the same, the core at ten times the rate of its factors",
        {**alone, "shared_rate": 10 * rate},
    )
    yield (
        "core_leading",
        "of the coordinates as many as the rank: the leading",
        {"core_rank": "none", "selection": "leading"},
    )
    yield (
        "core_block",
        "of the coordinates as many as the rank, by trained scores",
        {"core_rank": "none", "selection": "block"},
    )
    for selection, what in {
        "block": "coordinates by trained scores",
        "score": "single entries by trained scores",
        "score_frozen": "single entries by random scores",
        "magnitude": "the largest entries",
        "random": "random entries",
    }.items():
        words = f"every client's own basis, A (I + T) B, and of the matrix {what}"
        yield f"select_{selection}", words, {**alone, "selection": selection}

    for relation, what in {
        "depth": "by relative depth",
        "places": "by depth in the whole model",
        "cka": "by likeness of activations",
        "random": "at random",
    }.items():
        yield f"relation_{relation}", f"layers related {what}", {"relation": relation}
    yield (
        "transpose",
        "the transposed upload, and one mean for all",
        {"upload": "transpose", **mean},
    )
    yield "slots_2", "two slots of layers", {"num_slots": 2}
    yield "relation_trained", "the relation is trained too", {"train_relation": True}
    shared = best.get("shared_rate", rate)
    for factor in (0.3, 3.0):
        yield (
            f"shared_x{factor:g}",
            f"the shared part at {factor:g} times its rate",
            {"learning_rate": rate, "shared_rate": factor * shared},
        )


def shard_rows() -> dict[str, Row]:
    """Return the rows of global learning: one head for all, but where everyone is alone.

    Fed-HeLLo has one rank and clients that train few of its layers; the others have all layers and
    small ranks. Both cost a client about the same (`plan_groups.shard_budgets`).
    """
    layers = {"heads": "shared", "budgets": shard_budgets()}
    common = {
        **HEADS,
        **layers,
        # Twelve rounds are few: the scores of layers come after two of them, and every two.
        "fim_warmup": 2,
        "fim_every": 2,
    }
    allocations = {
        "fim": "layers drawn by Fisher scores",
        "gd": "layers given by a shape over depth",
        "rgd": "layers drawn by that shape",
        "combined": "by the shape first, then by Fisher scores",
    }
    return {
        **LOCAL,
        **{name: BASELINES[name]._replace(mean_heads=True) for name in ("hetlora", "flexlora")},
        "fedra": Row("fedra", {**HEADS, **layers}, rank=max(SHARD_RANKS)),
        **{
            f"fed_hello_{allocation}": Row(
                "fed_hello", {**common, "allocation": allocation}, words, rank=max(SHARD_RANKS)
            )
            for allocation, words in allocations.items()
        },
    }
