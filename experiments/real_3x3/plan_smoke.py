"""The bench in small: tiny random models, every kind of setting, in seconds. Nothing can be learnt."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import plan_rows
from plan_types import Point, Row, Setting

WORDS = {"fruit": ("apple", "plum", "pear"), "tool": ("saw", "axe", "file")}


def smoke(folder: Path) -> dict[str, Setting]:
    """Return settings of a tiny random model, whose data it writes into a folder."""
    rng = np.random.default_rng(0)
    lines = [
        json.dumps({"text": " ".join(rng.choice(WORDS[label], 3)), "label": label})
        for label in WORDS
        for _ in range(60)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "words.jsonl"
    data.write_text("\n".join(lines))

    forms = plan_rows.forms({"shared_rank": 4})
    rows = {
        **plan_rows.LOCAL,
        **plan_rows.BY_TASK,
        "fedit": plan_rows.BASELINES["fedit"],
        "h2tune": forms["h2tune"],
    }
    some = {name: rows[name] for name in ("local", "h2tune")}
    alone = {"h2tune_alone": forms["h2tune_alone"]}
    tiny = Setting(
        name="smoke",
        title="A tiny random model",
        about="Nothing can be learnt from it.",
        groups=(_clients("tiny-words", data),),
        rows=rows,
        seeds=(0, 1),
        grid_seeds=(100,),
        rounds=2,
    )
    shards = tuple(
        _clients(f"tiny_r{rank}-words", data, rank, {"kind": "pathological", "classes": 1})
        for rank in (2, 4)
    )
    by_fisher = {
        **plan_rows.HEADS,
        "allocation": "fim",
        "heads": "shared",
        "budgets": {"tiny_r2-words": 1, "tiny_r4-words": 2},
        "fim_warmup": 1,
        "fim_every": 1,
    }
    settings = (
        tiny,
        tiny._replace(
            name="newcomers",
            groups=({**_clients("tiny-words", data), "count": 3},),
            # Each is tested at the other's rate, too.
            rows={
                "local": some["local"],
                "h2tune": some["h2tune"]._replace(also_at="h2tune_alone"),
                **alone,
            },
            newcomers=1,
        ),
        tiny._replace(name="ablation", rows=some, against="h2tune", shares="smoke"),
        tiny._replace(
            name="shards",
            groups=shards,
            rows={
                **plan_rows.LOCAL,
                "hetlora": plan_rows.BASELINES["hetlora"]._replace(mean_heads=True),
                "fed_hello_fim": Row("fed_hello", by_fisher, rank=4),
            },
            moment="downloaded",
            server={**_clients("tiny_server-words", data), "count": 1},
        ),
        *(
            tiny._replace(
                name=f"rank{rank}",
                groups=(_clients("tiny-words", data, rank),),
                rows=some,
                point=Point("rank", rank),
                shares="smoke" if rank == 2 else None,
                rates_from="smoke",
            )
            for rank in (2, 4)
        ),
    )
    return {setting.name: setting for setting in settings}


def _clients(
    name: str, data: Path, rank: int = 2, partition: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Describe two clients of a tiny random model."""
    shape = {"family": "bert", "width": 8, "layers": 2, "heads": 2, "mlp_width": 12}
    task = {"data": str(data), "train": 8, "validation": 8, "test": 8, "max_length": 12}
    return {
        "name": name,
        "count": 2,
        "rank": rank,
        "alpha": 8.0 * rank,
        "targets": ["q", "up"],
        "model": {
            "source": "random",
            "tokenizer": "bytes",
            "pooling": "mean",
            "shape": {**shape, "max_positions": 16},
        },
        "task": task if partition is None else {**task, "partition": partition},
        "budget": {"batch_size": 4, "steps": 1},
    }
