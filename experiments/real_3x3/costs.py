"""What a row costs beside its time: how many numbers a client trains, and the memory of a round.

    python experiments/real_3x3/costs.py both      # appends to results/costs.csv what is missing there

A client's trained numbers are counted, not declared: the entries of its adapters (head included) that
differ between right after a download and after the training that follows. (H2Tune's relations and scores,
and entries of G that its core did not take, are in no adapter and not counted.)

Memory is the compiled round's own plan: arguments (frozen weights, data, all clients, the server),
temporaries and results, less what is reused.
"""

import argparse
import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import plan
from one_run import Programs, federation_of, programs_of, usual, with_rate
from plan_types import Setting, fingerprint, own_rows
from record import append_cost, costs_of

import h2tune_jax as h2
from h2tune_jax.bench.measure import planned_bytes
from h2tune_jax.run.federation import Federation

RESULTS = Path(__file__).parent / "results"


def trained_numbers(
    programs: Programs, federation: Federation, state: h2.RoundState, after: h2.RoundState
) -> float:
    """Count what a client trained in a round, the mean over those who took part."""
    method, specs, ids = programs.method, programs.specs, usual(programs)
    downloads = method.broadcast(specs, jax.random.key(0), state.server, ids, state.round)
    counts: list[int] = []
    for spec, download, chosen, old, new in zip(
        specs, downloads, ids, state.clients, after.clients
    ):
        for place, client in enumerate(chosen):
            own = lambda tree, at=client: jax.tree.map(lambda leaf: leaf[at], tree)
            personal = jax.tree.map(lambda leaf, at=place: leaf[at], download.personal)
            sent = h2.Download(download.common, personal)
            before = method.adapters(spec, state.server, own(old), sent)
            trained = method.adapters(spec, after.server, own(new), None)
            counts.append(_moved(before, trained))
    return float(np.mean(counts))


def _moved(before: Any, after: Any) -> int:
    """Count the entries that differ, in leaves that both have (a ledger beside the base may be absent)."""
    old = dict(jax.tree.leaves_with_path(before))
    return sum(
        int(jnp.sum(leaf != old[path]))
        for path, leaf in jax.tree.leaves_with_path(after)
        if path in old and old[path].shape == leaf.shape
    )


def cost_of(setting: Setting, name: str, federation: Federation) -> dict[str, Any]:
    """Compile a row's round and run it twice (a first one may start from nothing): -> its line."""
    row = setting.rows[name]
    programs = programs_of(setting, row, federation.specs)
    method, seed = programs.method, setting.grid_seeds[0]
    state = h2.init_round(
        method, programs.specs, federation.bases, federation.probe, jax.random.key(seed)
    )
    ids = usual(programs) if programs.newcomers else None
    rest = (
        federation.bases, federation.train, ids, None,
        with_rate(method.hyper, row.rates[0]), np.uint32(seed), federation.probe,
    )  # fmt: skip
    program = programs.round_fn.lower(state, *rest).compile()
    planned = planned_bytes(program, (state, *rest))
    state, _ = program(state, *rest)
    # A round takes the buffers of its state, which is still to be compared with what comes out.
    after, _ = program(jax.tree.map(jnp.copy, state), *rest)
    return {
        "setting": setting.name, "row": name, "plan": fingerprint(setting, row),
        "trained": round(trained_numbers(programs, federation, state, after), 1),
        "planned_bytes": planned, "device": jax.devices()[0].device_kind, "jax": jax.__version__,
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("settings", nargs="+", metavar="setting")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true", help="tiny random models")
    args = parser.parse_args(argv)
    settings = plan.smoke(args.out) if args.smoke else plan.SETTINGS
    if unknown := set(args.settings) - settings.keys():
        parser.error(f"no setting is called {min(unknown)!r}; there are {', '.join(settings)}")
    for setting in (settings[name] for name in args.settings):
        bases = None
        for name, row in own_rows(setting, settings).items():
            if row.by_task_of is not None or name in costs_of(setting, args.out):
                continue
            federation = federation_of(setting, row, setting.grid_seeds[0], bases)
            bases = federation.bases
            line = cost_of(setting, name, federation)
            append_cost(args.out, line)
            print(f"{setting.name} {name}: {line['trained']:,.0f} numbers trained, "
                  f"{line['planned_bytes'] / 1e6:,.0f} MB", flush=True)  # fmt: skip
            jax.clear_caches()
            gc.collect()


if __name__ == "__main__":
    main()
