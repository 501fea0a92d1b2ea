"""Weights & Biases: an extra, which talks to a server. Imported only where a run asks for it."""

import importlib
import zlib
from typing import Any

from h2tune_jax.run.events import Observer, Started
from h2tune_jax.run.scalars import scalar_observer
from h2tune_jax.types import FederationError


def wandb(project: str = "h2tune", **options: Any) -> Observer:
    """Build an observer that logs to a W&B project; `options` go to `wandb.init`.

    A resumed run goes on as the same W&B run: its id comes of the run's folder.
    """
    try:
        module = importlib.import_module("wandb")
    except ModuleNotFoundError as error:
        if error.name != "wandb":
            raise
        raise FederationError(
            "log.wandb: the package wandb is not installed. Install the extra, "
            "pip install 'h2tune-jax[wandb]', or set log.wandb = false"
        ) from None
    run: Any = None

    def begin(event: Started) -> None:
        nonlocal run
        own: dict[str, Any] = {}
        if event.folder is not None:
            place = str(event.folder.resolve()).encode()
            own = {
                "id": f"{event.config.name}-{zlib.crc32(place):08x}",
                "resume": "allow",
                "dir": str(event.folder),
            }
        settings = event.config.model_dump(mode="json")
        run = module.init(
            **{"project": project, "name": event.config.name, "config": settings, **own, **options}
        )

    return scalar_observer(
        "W&B",
        begin=begin,
        write=lambda scalars, step: run.log(scalars, step=step),
        end=lambda: run.finish(),
    )
