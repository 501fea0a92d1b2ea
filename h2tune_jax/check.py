"""Bad input, found while shapes are all there is: errors that name the cohort and the field."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from h2tune_jax.types import CohortSpec, FederationError, PyTree, Specs, near_match


@contextlib.contextmanager
def named_errors(spec: CohortSpec, doing: str) -> Iterator[None]:
    """Say which cohort an error belongs to that arises while its program is traced."""
    try:
        yield
    except KeyError as error:
        raise FederationError(
            f"cohort {spec.name!r}: {doing} asks for {error}, which is not there; "
            f"its adapted sites are {', '.join(spec.kinds) or 'none'}"
        ) from error
    except (TypeError, ValueError) as error:
        if isinstance(error, FederationError) and str(error).startswith("cohort "):
            raise
        raise FederationError(f"cohort {spec.name!r}: {doing}: {error}") from error


def check_federation(method: Any, specs: Specs, bases: tuple | None) -> None:
    """Refuse federations that make no sense, whatever the arrays hold."""
    if not isinstance(specs, tuple) or not specs:
        raise FederationError("specs: expected a tuple of one CohortSpec or more")
    names = [spec.name for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise FederationError(f"cohort {name!r}: name is used twice")
    if bases is not None and len(bases) != len(specs):
        raise FederationError(f"bases: expected one a cohort ({len(specs)}), got {len(bases)}")
    method.check(specs)


def check_round_inputs(
    method, specs: Specs, state, bases, data, client_ids, weights, hyper, resident: bool
) -> None:
    """Refuse arrays that do not fit the specs. Looks at shapes and dtypes only, while tracing."""
    for field, value in (
        ("bases", bases),
        ("data", data),
        ("client_ids", client_ids),
        ("weights", weights),
        ("state.clients", state.clients),
    ):
        if not isinstance(value, tuple) or len(value) != len(specs):
            raise FederationError(
                f"{field}: expected a tuple of one entry a cohort ({len(specs)}), got "
                f"{len(value) if isinstance(value, tuple) else type(value).__name__}"
            )
    _check_hyper(method.hyper, hyper)
    for i, spec in enumerate(specs):
        where = f"cohort {spec.name!r}"
        ids, share = client_ids[i], weights[i]
        if ids is not None:
            if ids.ndim != 1 or not jnp.issubdtype(ids.dtype, jnp.integer):
                raise FederationError(
                    f"{where}: client_ids must be i32[S], got {ids.dtype}{list(ids.shape)}"
                )
            if resident and ids.shape[0] > spec.num_clients:
                raise FederationError(
                    f"{where}: client_ids has {ids.shape[0]} clients, the cohort {spec.num_clients}"
                )
        rows = spec.num_clients if resident or ids is None else ids.shape[0]
        taking_part = spec.num_clients if ids is None else ids.shape[0]
        if share is not None and share.shape != (taking_part,):
            raise FederationError(
                f"{where}: weights must be f32[{taking_part}], got {list(share.shape)}"
            )
        if taking_part:
            _check_data(where, data[i], rows)
        for leaf in jax.tree.leaves(state.clients[i]):
            if leaf.shape[:1] != (rows,):
                raise FederationError(
                    f"{where}: state.clients leads with {leaf.shape[:1]}, expected {rows} clients"
                )


def _check_data(where: str, data: PyTree, rows: int) -> None:
    leaves = jax.tree.leaves(data.examples)
    if not leaves:
        raise FederationError(f"{where}: data.examples has no arrays")
    room = leaves[0].shape[:2]
    for leaf in leaves:
        if leaf.ndim < 2 or leaf.shape[0] != rows or leaf.shape[:2] != room:
            raise FederationError(
                f"{where}: data.examples must lead with [{rows} clients, n], got {list(leaf.shape)}"
            )
    if room[1] < 1:
        raise FederationError(f"{where}: data.examples has no room for an example (n = 0)")
    if data.num_examples.shape != (rows,) or not jnp.issubdtype(
        data.num_examples.dtype, jnp.integer
    ):
        raise FederationError(
            f"{where}: data.num_examples must be i32[{rows}], got "
            f"{data.num_examples.dtype}{list(data.num_examples.shape)}"
        )


def _check_hyper(expected: Any, hyper: Any) -> None:
    if type(hyper) is not type(expected):
        raise FederationError(
            f"hyper: expected {type(expected).__name__} as in method.hyper, got {type(hyper).__name__}"
        )
    for field in getattr(expected, "_fields", ()):
        for leaf in jax.tree.leaves(getattr(hyper, field)):
            if jnp.shape(leaf) != ():
                raise FederationError(
                    f"hyper.{field}: expected a scalar, got shape {jnp.shape(leaf)}; "
                    "map over settings with jax.vmap"
                )


def check_choice(field: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuse an option's value that is not one of those allowed."""
    if value not in allowed:
        raise FederationError(f"{field}: {value!r} is unknown; {near_match(value, allowed)}")


def check_positive(field: str, value: float | None) -> None:
    """Refuse a number that is not finite and above zero; None means that it is not used."""
    if value is not None and not (math.isfinite(value) and value > 0):
        raise FederationError(f"{field}: must be positive, got {value}")


def check_not_negative(field: str, value: float | None) -> None:
    """Refuse a number that is not finite and at least zero; None means that it is not used."""
    if value is not None and not (math.isfinite(value) and value >= 0):
        raise FederationError(f"{field}: must be at least 0, got {value}")
