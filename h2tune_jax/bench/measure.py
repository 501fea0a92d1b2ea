"""Measure one case: memory planned before anything is allocated, compile time, then rounds."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import h2tune_jax as h2
from h2tune_jax.bench import machine
from h2tune_jax.bench.cases import Case
from h2tune_jax.bench.trace import PROGRAM
from h2tune_jax.bench.workload import Unavailable, Workload, build, count_tokens
from h2tune_jax.types import PyTree

WARM = 2  # rounds before the clock counts
HEADROOM = 0.9  # of the free memory may be planned
POOR_SHARE = 0.2  # of the peak rate, where a round's length is guessed before it runs


class Limits(NamedTuple):
    """How long a case may take.

    `runs` timed rounds and `compiles` compilations; a case whose rounds would take longer than
    `seconds` altogether at a fifth of the peak rate is skipped.
    """

    runs: int = 7
    compiles: int = 3
    seconds: float = 600.0


class Compiled(NamedTuple):
    """A round's program."""

    round_fn: Callable
    seconds: machine.Spread  # of tracing, lowering and compiling
    planned: int  # bytes
    text: str


def measure(
    case: Case, limits: Limits, peak: machine.Spread, *, trace: Path | None = None
) -> dict[str, Any]:
    """Measure a case: -> the columns of its row. With `trace` one more round is traced into that folder.

    Raises:
      Unavailable: it does not fit or cannot run here; the message says why.
    """
    if case.devices > jax.device_count():
        raise Unavailable(f"{case.devices} devices are asked for, there are {jax.device_count()}")
    # Virtual devices of the CPU share its cores.
    top = peak.median * (1 if jax.default_backend() == "cpu" else case.devices)
    load = build(case)
    state = _state_shapes(load)
    _refuse_too_large(_bytes((load.base_shapes, load.data_shapes, state)), "base, data and clients")
    _refuse_too_long((limits.runs + WARM), load.flops, top, limits.seconds)
    mesh = _mesh(case)
    compiled = _compile(load, state, case, mesh, limits.compiles)
    machine.reset_peak()
    seconds, tokens = _run(load, compiled.round_fn, mesh, limits.runs, trace)
    if trace is not None:
        (trace / PROGRAM).write_text(compiled.text)
    times = machine.spread(seconds)
    rate = load.flops / times.median
    return {
        "weights": load.weights,
        "trace": None if trace is None else str(trace),
        "runs": limits.runs,
        "seconds": times.median,
        "seconds_low": times.low,
        "seconds_high": times.high,
        "clients_per_second": case.clients / times.median,
        "examples_per_second": case.clients * case.batch * case.steps / times.median,
        "tokens_per_second": None if tokens is None else tokens / times.median,
        "compile_seconds": compiled.seconds.median,
        "compile_low": compiled.seconds.low,
        "compile_high": compiled.seconds.high,
        "planned_bytes": compiled.planned,
        "peak_bytes": machine.peak_memory(),
        "tflop_a_round": load.flops / 1e12,
        "gflops": rate / 1e9,
        "peak_gflops": peak.median / 1e9,
        "peak_low": peak.low / 1e9,
        "peak_high": peak.high / 1e9,
        "share_of_peak": rate / top,
    }


def _state_shapes(load: Workload) -> PyTree:
    init = lambda base, key: h2.init_round(load.method, load.specs, (base,), None, key)
    return jax.eval_shape(init, load.base_shapes, jax.random.key(0))


def _bytes(tree: PyTree) -> int:
    leaves = jax.tree.leaves(tree)
    return sum(int(np.prod(x.shape, dtype=np.int64)) * jnp.dtype(x.dtype).itemsize for x in leaves)


def planned_bytes(program: jax.stages.Compiled, arguments: PyTree) -> int:
    """Return what a compiled program will hold, by its own plan; without one, its arguments alone."""
    plan = program.memory_analysis()
    if plan is None:
        return _bytes(arguments)
    results = plan.output_size_in_bytes - plan.alias_size_in_bytes
    return plan.argument_size_in_bytes + plan.temp_size_in_bytes + results


def _refuse_too_large(size: int, what: str) -> None:
    free = HEADROOM * machine.free_memory()
    if size > free:
        raise Unavailable(
            f"{what} need {size / 1e9:.3g} GB, and {free / 1e9:.3g} GB may be used here"
        )


def _refuse_too_long(rounds: int, flops: int, top: float, allowed: float) -> None:
    guess = rounds * flops / (POOR_SHARE * top)
    if guess > allowed:
        raise Unavailable(
            f"{rounds} rounds of {flops / 1e12:.3g} TFLOP may take {guess:.0f} s, "
            f"more than the {allowed:.0f} s of --seconds"
        )


def _mesh(case: Case) -> Mesh | None:
    if case.devices == 1:
        return None
    devices = jax.devices()[: case.devices]
    return jax.make_mesh((case.devices,), ("clients",), (AxisType.Auto,), devices=devices)


def _compile(
    load: Workload, state: PyTree, case: Case, mesh: Mesh | None, compiles: int
) -> Compiled:
    """Compile from shapes alone, so that a round that does not fit is known before it runs."""
    axis = int(case.axis) if case.axis.isdigit() else case.axis
    make: Any = lambda: h2.make_round(load.method, load.specs, client_axis=axis, mesh=mesh)
    rest = (load.base_shapes,), (load.data_shapes,), (None,), (None,), load.method.hyper
    seconds, round_fn, program = [], None, None
    for _ in range(compiles):
        began = time.perf_counter()
        round_fn = make()
        program = round_fn.lower(state, *rest, np.uint32(0)).compile()
        seconds.append(time.perf_counter() - began)
    assert round_fn is not None  # at least one compilation
    assert program is not None
    planned = planned_bytes(program, (state, *rest))
    _refuse_too_large(planned, "a round's arguments and temporaries")
    # A compiled program takes arrays as they were described, and a mesh spreads them.
    run = program if mesh is None else round_fn
    return Compiled(run, machine.spread(seconds), planned, program.as_text() or "")


def _run(
    load: Workload, round_fn: Callable, mesh: Mesh | None, runs: int, trace: Path | None
) -> tuple[list[float], int | None]:
    """Run rounds: -> (seconds of each, tokens of a round)."""
    base, data = load.make_base(), load.make_data()
    state = h2.init_round(load.method, load.specs, (base,), None, jax.random.key(0))
    if mesh is not None:
        # What does not lie on the mesh would be copied there every round.
        everywhere = NamedSharding(mesh, PartitionSpec())
        state, base, data = jax.device_put((state, base, data), everywhere)
    tokens = count_tokens(data)
    rest = (base,), (data,), (None,), (None,), load.method.hyper, np.uint32(0)
    seconds, metrics = [], None
    for _ in range(WARM + runs):
        began = time.perf_counter()
        state, metrics = jax.block_until_ready(round_fn(state, *rest))
        seconds.append(time.perf_counter() - began)
    if trace is not None:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # one call of Python: its frames would hide the rest
        with jax.profiler.trace(str(trace), profiler_options=options):
            state, metrics = jax.block_until_ready(round_fn(state, *rest))
    assert metrics is not None  # WARM rounds at least
    rejected = sum(int(count) for count in jax.tree.leaves(metrics.rejected))
    if rejected:
        raise RuntimeError(f"{rejected} clients were refused: what they trained was not finite")
    return seconds[WARM:], tokens
