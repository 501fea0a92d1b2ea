"""The plan of the bench: its rule, its settings, and in which order they run.

THE RULE, fixed before any test number is looked at.

- In every setting each row is trained at every rate of its grid, with the seeds `GRID_SEEDS`, and measured
  on validation rows; where the best is at an end of the grid, the grid goes on (`LADDER`). The rate with
  the best mean accuracy over clients and seeds (a tie goes to the lower one) is trained anew with the
  setting's seeds, and those runs are measured on test rows. All lines are kept.
- A seed gives every row the same examples, the same heads at the start, and the same factors where shapes
  are equal, so differences are paired by it. (In `shards` there is one head, which starts elsewhere in
  Fed-HeLLo's rows.)
- Every row has the same budget of steps and the same rate of heads. H2Tune's alternation takes two
  gradients a step; rows with alternation "joint" take one, as the other methods do. `centralised`, the
  ceiling, takes the steps of all its clients, one after the other.
- Accuracy is taken after local training, before the next download. Where the aim is one global model
  (`shards`), it is taken right after a download, on the whole test set.
- Beside it, in `tasks` and `models`: the same clients right after a download, and newcomers, who never
  trained, after one round of their own (the first 200 test rows).
- The form `h2tune_common` (`COMMON_BASIS`) was chosen before this plan was fixed, on validation rows of the
  seeds 0 and 1, which are used for nothing else, and is not touched after. Some twenty forms were looked
  at there; baselines have had no such attention.
- The ablation changes that form in one thing at a time (and in what that thing needs), in the federation
  of `both`. Rows whose core, basis or selection differ have the grid, the others the rate of
  `h2tune_common`. H2Tune without its middle matrix is a plain LoRA, with nothing left that could
  alternate: that row is `local`.
- The curves have no grid: a row takes the rate that it chose in `both`.
- What two settings have in common is run once, in the first of them.

AMENDED after the first rows of `both` and `models` had been tested, for the sake of the baselines (but for
`crowd`); the form `h2tune_common` stayed as it was.
- Grids go on beyond their ends; tests at a rate that is no longer the best stay in the file, and out of the
  report.
- `hetlora` does not prune: of ranks like these its pruning takes an eighth at once.
- `co_lora`'s factors are fitted on 1,024 public texts, not 64.
- Server momentum takes steps of 1 in all, not of 10; the curve over ranks keeps alpha / rank.
- `fedra` is a row of `shards`. `local_wide` was added, as the form of H2Tune trains more than `local` does.
- `crowd` was added, as sharing gave more in `models`, where five others have a client's task, than in
  `both`, where two have.

AMENDED again, when `both` was done and `tasks` and `models` half: what follows from a review of the first
results. The form `h2tune_common` stayed as it was.
- What sharing itself adds is measured at one rate: a row that shares nothing is tested at the rate of the
  row that shares, too, and not only at its own best.
- `depths` was added: one task on six models of which no two are one. In `models` and `crowd` a client
  has another one with its own model, so they cannot tell what crosses models.
- `pooled` and `pooled_shards` were added: what all examples in one place give, where `centralised` pools
  two clients.
- The form that shares nothing stands beside in the curves and in `smollm2`; the curves have `ce_lora`,
  the best baseline of `both`, in the place of `co_lora`. There is one over the number of rounds, too.
- The ablation has rows of the form `h2tune` too: its shared part at ten times the rate (so that its basis
  can be told from its rate), alone with all parts at once, another basis, frozen factors.
- Rows of H2Tune are also measured with their core set to zero after training: what the core carries.

AMENDED a third time, when half of the ablation was done, to stay within some hours: rows that had not run
yet and whose parameters mean what those of another row do take its rate and have no grid of their own.
Selections between own factors take that of `select_block`, `h2tune_fast_alone` that of `h2tune_fast`,
`h2tune_seeded` that of `h2tune`. It makes them comparable at one rate, too.

AMENDED a fourth time, after a review of the statistics, when all but the curves and some of the ablation
had been tested.
- `local_by_task` was added: one rate for nine clients who are alone is a choice that nobody alone would
  make. It is `local` with the rule applied to every task by itself.
- `h2tune_common` is tested at the rate of the row that shares nothing, too: what sharing adds at its own
  rate alone counts what that rate does to who is alone.
- `basis_random_fast` was added: `h2tune_fast` has a fast core and the paper's terms, of which one alone
  keeps a core small, so it could not tell which of both matters.

AMENDED a fifth time, when nearly all had been tested, for the sake of a baseline.
- `co_lora_4096` was added (in `both`, `models` and `depths`), and `basis_anchored_4096`: 1,024 texts are
  fewer than the widest sites have outputs (1,536), which leaves a third of the factors there to chance.
- `crowd` has five seeds, as the other settings have, in the place of three. Those had been looked at: what
  sharing adds was anything from -3.5 to +4.8 points. It has `local_by_task`, too.

`plan_groups.py` has the clients, `plan_rows.py` the rows.
"""

from collections.abc import Iterator

import plan_rows
from plan_groups import (
    DEPTHS,
    EXAMPLES,
    MINILMS,
    PROBE,
    RANK,
    TEXTS,
    clients,
    every_pair,
    last_groups,
    pooled,
    pooled_shards,
    shard_server,
    shards,
)
from plan_smoke import smoke
from plan_types import Point, Row, Setting

__all__ = ["ALONE", "BASELINE", "BEST", "COMMON_BASIS", "FLOOR", "ROWS", "SETTINGS", "smoke"]

COMMON_BASIS = {
    "core": "parallel",
    "basis": "singular",
    "selection": "leading",
    "shared_rank": 64,
    "core_rank": 64,
    "relation": "places",
    "train_relation": False,
    "sharing": "similar",
    "similarity": "data",
    "alternation": "joint",
    "lambda_norm": "none",
    "lambda_keep": "none",
    "lambda_distil": "none",
    "learning_rate": 1e-3,
    "shared_rate": 1e-2,
}

SEEDS = (10, 11, 12, 13, 14)
FEW_SEEDS = SEEDS[:3]  # where hours would not do for five: many rows, larger models
GRID_SEEDS = (100,)
NEWCOMERS = 1  # of each group, where groups have several clients

ALONE = "_alone"  # behind a row's name: the same, and nothing is shared
FLOOR, BEST, BASELINE = "local", "h2tune_common", "ce_lora"
TUNED_FLOOR = "local_by_task"
CURVES = {"rank": (2, 4, 8, 16), "examples": (64, 128, 256, 512), "rounds": (6, 12, 24)}

ROWS = {**plan_rows.LOCAL, **plan_rows.BASELINES, **plan_rows.forms(COMMON_BASIS)}

# Nobody else has a client's model and task in `both`, so one model a cohort is everyone's own.
ROWS_OF_BOTH = {
    "local": ROWS["local"],
    **plan_rows.BY_TASK,
    **plan_rows.WIDE,
    **{name: row for name, row in ROWS.items() if name != "centralised"},
}
OTHER_ROWS = {name: ROWS[name] for name in ROWS if name not in ("h2tune_paper", "h2tune_alone")}
# Nothing is fitted where all have one model.
ROWS_OF_ONE_MODEL = {name: OTHER_ROWS[name] for name in OTHER_ROWS if name != "co_lora_4096"}
ROWS_OF_ONE_MODEL["co_lora"] = ROWS["co_lora"]._replace(words="")


def _some(*names: str) -> dict[str, Row]:
    return {name: ROWS[name] for name in names}


BOTH = Setting(
    name="both",
    title="Three tasks on three models",
    about="Every model with every task, one client each: nobody else has a client's model and task.",
    groups=every_pair(),
    rows=ROWS_OF_BOTH,
    seeds=SEEDS,
    grid_seeds=GRID_SEEDS,
    probe=PROBE,
)


OWN_POINT = {"rank": RANK, "examples": EXAMPLES, "rounds": BOTH.rounds}  # where `both` stands


def _curves() -> Iterator[Setting]:
    """Give a setting for every point of every curve; that of `both` itself has nothing to run."""
    for curve, values in CURVES.items():
        for value in values:
            is_both = value == OWN_POINT[curve]
            over_rounds = curve == "rounds"
            yield BOTH._replace(
                name=f"{curve}{value}",
                title=f"{curve} {value}",
                about=f"As `both`, with {curve} {value}.",
                groups=every_pair(**({} if over_rounds else {curve: value})),
                rounds=value if over_rounds else BOTH.rounds,
                rows=_some(FLOOR, BASELINE, BEST, BEST + ALONE),
                seeds=FEW_SEEDS,
                point=Point(curve, value),
                shares="both" if is_both else None,
                rates_from="both",
            )


SETTINGS = {
    setting.name: setting
    for setting in (
        BOTH,
        BOTH._replace(
            name="tasks",
            title="Three tasks on one model",
            about="TREC, sarcasm and film reviews on MiniLM with 3 of its layers; of each two clients and "
            "a newcomer.",
            groups=tuple(clients("minilm3", task, 2 + NEWCOMERS) for task in TEXTS),
            rows=ROWS_OF_ONE_MODEL,
            newcomers=NEWCOMERS,
        ),
        BOTH._replace(
            name="models",
            title="One task on three models",
            about="TREC on MiniLM with 6, 4 and 3 of its layers; of each two clients and a newcomer.",
            groups=tuple(clients(model, "trec", 2 + NEWCOMERS) for model in MINILMS),
            rows=OTHER_ROWS,
            newcomers=NEWCOMERS,
        ),
        BOTH._replace(
            name="depths",
            title="One task on six models",
            about="TREC on MiniLM with 6, 5, 4 and 3 of its layers, of 4 and 3 two choices each, one "
            "client a model: what helps here has crossed models.",
            groups=tuple(clients(model, "trec") for model in DEPTHS),
            rows=_some(
                FLOOR, "heterotune", "co_lora", "co_lora_4096", "h2tune", BEST, BEST + ALONE
            ),
        ),
        BOTH._replace(
            name="pooled",
            title="One task, all in one place",
            about="The models of `models`, each trained by one client that has as many examples and takes "
            "as many steps as the six clients there have together.",
            groups=tuple(pooled(model, 2 * len(MINILMS)) for model in MINILMS),
            rows=_some(FLOOR),
        ),
        BOTH._replace(
            name="crowd",
            title="Three tasks on three models, twice",
            about="The federation of `both` with two clients of every model and task: five others have a "
            "client's task, not two.",
            groups=every_pair(count=2),
            rows={
                **_some(FLOOR),
                **plan_rows.BY_TASK,
                **_some("fedit", "ce_lora", BEST, BEST + ALONE),
            },
        ),
        BOTH._replace(
            name="ablation",
            title="What each part of H2Tune does",
            about="The federation of `both`; every row is H2Tune's form in a common basis but for one "
            "thing. Its form in the paper and what the authors' public code states stand beside.",
            rows={
                **_some(FLOOR, BEST, "h2tune_common_alone", "h2tune", "h2tune_alone"),
                **plan_rows.default_form(),
                **plan_rows.reference_form(),
                **plan_rows.ablation(COMMON_BASIS, BEST),
            },
            seeds=FEW_SEEDS,
            against=BEST,
            shares="both",
        ),
        Setting(
            name="shards",
            title="One global model from non-IID shards",
            about="Fed-HeLLo's kind of task: TREC on MiniLM with 4 of its layers; eight clients with "
            "three of the six labels each, two of every rank in 2, 4, 8 and 16. What a client has right "
            "after a download is tested on all labels. There is one head: HetLoRA and "
            "FlexLoRA, whose heads are personal elsewhere, are given the mean of all heads after every "
            "round. The forms by Fisher scores have 64 labelled rows at the server, which nobody "
            "else has. `local` is every client's own model on the same rows.",
            groups=shards(),
            rows=plan_rows.shard_rows(),
            seeds=SEEDS,
            grid_seeds=GRID_SEEDS,
            moment="downloaded",
            server=shard_server(),
            judged="fed_hello",
        ),
        Setting(
            name="pooled_shards",
            title="The shards in one place",
            about="The model of `shards` with rank 16, trained by one client that has as many examples, of "
            "all labels, and takes as many steps as the eight clients there have together.",
            groups=(pooled_shards(),),
            rows=_some(FLOOR),
            seeds=SEEDS,
            grid_seeds=GRID_SEEDS,
        ),
        *_curves(),
        Setting(
            name="smollm2",
            title="Two families of models",
            about="MiniLM with 6 and 3 layers, and the first 6 layers of SmolLM2-135M (dequantised "
            "Q4_1), each with TREC, sarcasm and film reviews. Two-choice questions (QuaRTz) are left "
            "out: they need next-token logits, which 6 of 30 layers do not give, and the whole model is "
            "beyond this bench's hours.",
            groups=last_groups(),
            rows={
                **_some(FLOOR),
                **plan_rows.BY_TASK,
                **_some("fedit", "heterotune", "ce_lora", "co_lora", "h2tune", BEST, BEST + ALONE),
            },
            seeds=FEW_SEEDS,
            grid_seeds=GRID_SEEDS,
            probe=PROBE,
        ),
    )
}
"""In the order in which they run."""
