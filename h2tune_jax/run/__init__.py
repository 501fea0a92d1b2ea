"""The shell round the pure core: configuration, the loop, run folders, checkpoints, and what people see.

    from h2tune_jax.run import load_config, simulate

    result = simulate(load_config("h2tune.toml"), out="runs/first")

`docs/run.md` is the account for users. Names are imported when they are first asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from h2tune_jax.run.catalog import build_method, method_names
    from h2tune_jax.run.config import ConfigError, RunConfig, config_toml, load_config, make_config
    from h2tune_jax.run.disk import RunError
    from h2tune_jax.run.export import export_client
    from h2tune_jax.run.federation import Federation, build_federation
    from h2tune_jax.run.inspect import inspect_run
    from h2tune_jax.run.loop import RunResult, run_rounds, simulate
    from h2tune_jax.run.report import write_report
    from h2tune_jax.run.use import open_run, predict

_HOMES = {
    "ConfigError": "config",
    "Federation": "federation",
    "RunConfig": "config",
    "RunError": "disk",
    "RunResult": "loop",
    "build_federation": "federation",
    "build_method": "catalog",
    "config_toml": "config",
    "export_client": "export",
    "inspect_run": "inspect",
    "load_config": "config",
    "make_config": "config",
    "method_names": "catalog",
    "open_run": "use",
    "predict": "use",
    "run_rounds": "loop",
    "simulate": "loop",
    "write_report": "report",
}

__all__ = [
    "ConfigError",
    "Federation",
    "RunConfig",
    "RunError",
    "RunResult",
    "build_federation",
    "build_method",
    "config_toml",
    "export_client",
    "inspect_run",
    "load_config",
    "make_config",
    "method_names",
    "open_run",
    "predict",
    "run_rounds",
    "simulate",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
