"""Bad input, found while shapes are all there is: errors that name the cohort and the field."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh

from h2tune_jax.types import KINDS, CohortSpec, FederationError, PyTree, Specs, near_match


@contextlib.contextmanager
def named_errors(spec: CohortSpec, doing: str) -> Iterator[None]:
    """Say which cohort an error belongs to that arises while its program is traced."""
    where = f"cohort {spec.name!r}: {doing}"
    try:
        yield
    except KeyError as error:
        name = error.args[0] if error.args else error
        if (name in spec.model.shapes and name not in spec.kinds) or name in KINDS:
            about = f"site {name!r}, which is not adapted; adapted are {', '.join(spec.kinds)}"
        else:
            about = f"{name!r}, a key that is neither in the batch's examples nor elsewhere there"
        raise FederationError(f"{where} asks for {about}") from error
    except (TypeError, ValueError) as error:
        if isinstance(error, FederationError) and str(error).startswith("cohort "):
            raise
        raise FederationError(f"{where}: {error}") from error


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


def check_mesh(mesh: Mesh) -> None:
    """Refuse meshes that clients cannot be split over."""
    if len(mesh.axis_names) != 1:
        raise FederationError(f"mesh: expected one (client) axis, got {mesh.axis_names}")
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise FederationError(
            "mesh: its axis must be of type Auto: "
            "jax.make_mesh((n,), ('clients',), axis_types=(jax.sharding.AxisType.Auto,))"
        )


def check_cohorts(specs: Specs, **fields: Any) -> None:
    """Refuse fields that are not tuples of one entry a cohort."""
    for field, value in fields.items():
        if not isinstance(value, tuple) or len(value) != len(specs):
            got = len(value) if isinstance(value, tuple) else type(value).__name__
            raise FederationError(
                f"{field}: expected a tuple of one entry a cohort ({len(specs)}), got {got}"
            )


def check_round_inputs(
    method, specs: Specs, state, bases, data, client_ids, weights, hyper, resident: bool
) -> None:
    """Refuse arrays that do not fit the specs. Looks at shapes and dtypes only, while tracing."""
    check_cohorts(
        specs,
        bases=bases,
        data=data,
        client_ids=client_ids,
        weights=weights,
        clients=state.clients,
    )
    _check_hyper(method.hyper, hyper)
    for i, spec in enumerate(specs):
        where = f"cohort {spec.name!r}"
        taking_part = spec.num_clients
        if client_ids[i] is not None:
            _check_array(f"{where}: client_ids", client_ids[i], jnp.integer, (None,))
            taking_part = client_ids[i].shape[0]
            if resident and taking_part > spec.num_clients:
                raise FederationError(
                    f"{where}: client_ids has {taking_part} clients, the cohort {spec.num_clients}"
                )
        if weights[i] is not None:
            _check_array(f"{where}: weights", weights[i], jnp.number, (taking_part,))
        check_clients(
            spec, spec.num_clients if resident else taking_part, data[i], state.clients[i]
        )


def _check_array(what: str, value: Any, kind: Any, shape: tuple[int | None, ...]) -> None:
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise FederationError(f"{what} must be an array, got {type(value).__name__}")
    fits = len(value.shape) == len(shape) and all(
        expected in (None, size) for size, expected in zip(value.shape, shape)
    )
    if not fits or not jnp.issubdtype(value.dtype, kind):
        wanted = ", ".join("S" if size is None else str(size) for size in shape)
        raise FederationError(
            f"{what} must be {kind.__name__}[{wanted}], got {value.dtype}{list(value.shape)}"
        )


def check_clients(spec: CohortSpec, rows: int, data: Any, clients: PyTree) -> None:
    """Refuse a cohort's data and state that do not have one row a client."""
    where = f"cohort {spec.name!r}"
    if not hasattr(data, "examples") or not hasattr(data, "num_examples"):
        raise FederationError(f"{where}: data must be ClientData, got {type(data).__name__}")
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
    _check_array(f"{where}: data.num_examples", data.num_examples, jnp.integer, (rows,))
    for leaf in jax.tree.leaves(clients):
        if leaf.shape[:1] != (rows,):
            raise FederationError(
                f"{where}: state.clients leads with {leaf.shape[:1]}, expected {rows} clients"
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


def check_named_cohorts(
    field: str, values: Mapping[str, Any], specs: Specs, most_fn: Callable[[CohortSpec], int]
) -> None:
    """Refuse a setting by cohort that names none, or is not a whole number up to what there is."""
    names = [spec.name for spec in specs]
    for name, value in values.items():
        if name not in names:
            raise FederationError(
                f"{field} names the cohort {name!r}, which is not there; {near_match(name, names)}"
            )
        check_whole(f"cohort {name!r}: {field}", value)
        most = most_fn(specs[names.index(name)])
        if value > most:
            raise FederationError(
                f"cohort {name!r}: {field}: {value} is above the {most} there are"
            )


def check_positive(field: str, value: float | None) -> None:
    """Refuse a number that is not finite and above zero; None means that it is not used."""
    _check_number(field, value)
    if value is not None and not (math.isfinite(value) and value > 0):
        raise FederationError(f"{field}: must be positive, got {value}")


def check_not_negative(field: str, value: float | None) -> None:
    """Refuse a number that is not finite and at least zero; None means that it is not used."""
    _check_number(field, value)
    if value is not None and not (math.isfinite(value) and value >= 0):
        raise FederationError(f"{field}: must be at least 0, got {value}")


def check_whole(field: str, value: Any) -> None:
    """Refuse what is not a whole number of at least 1; None means that it is not used."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise FederationError(f"{field}: must be a whole number of at least 1, got {value!r}")


def _check_number(field: str, value: Any) -> None:
    try:
        float(0 if value is None else value)
    except (TypeError, ValueError) as error:
        raise FederationError(f"{field}: must be a number, got {value!r}") from error
