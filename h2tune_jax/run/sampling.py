"""Who takes part in a round: a function of config, seed and round, and of nothing that happened."""

import zlib

import numpy as np

from h2tune_jax.run.settings import SamplingConfig
from h2tune_jax.types import FederationError, near_match

Participants = tuple[np.ndarray, ...]
"""i32[S] a cohort, ascending: the ids of those who take part."""


def in_training(counts: tuple[int, ...], newcomers: int, names: tuple[str, ...]) -> tuple[int, ...]:
    """Return how many clients of each cohort train: all but the last `newcomers`, who stay new."""
    for name, count in zip(names, counts):
        if newcomers >= count:
            raise FederationError(
                f"group {name!r}: evaluation.newcomers.count = {newcomers} leaves none of {count} clients "
                "to train"
            )
    return tuple(count - newcomers for count in counts)


def check_schedule(
    sampling: SamplingConfig, names: tuple[str, ...], counts: tuple[int, ...]
) -> None:
    """Refuse a schedule that names anybody but the first `counts` clients of each cohort."""
    for index, chosen in enumerate(sampling.schedule or ()):
        for client in chosen:
            name, _, place = client.rpartition("/")
            if name not in names or not place.isdecimal():
                raise FederationError(
                    f"sampling.schedule: round {index} names {client!r}, which is no client; "
                    f"{near_match(name, names)}"
                )
            count = counts[names.index(name)]
            if int(place) >= count:
                raise FederationError(
                    f"sampling.schedule: round {index} names {client}, but only the first {count} "
                    f"clients of group {name!r} train: the others are newcomers, or not there"
                )


def participants(
    sampling: SamplingConfig,
    *,
    names: tuple[str, ...],
    counts: tuple[int, ...],
    weights: tuple[np.ndarray, ...],
    seed: int,
    round_index: int,
) -> Participants:
    """Draw a round's participants, so many of each cohort in every round (but by schedule).

    Args:
      sampling: how; a schedule has passed `check_schedule`.
      names: of the cohorts; each draws for itself, whoever stands beside it.
      counts: how many clients of each cohort may be drawn: ids from 0 on.
      weights: f32[C] a cohort, for kind "weight": chances in proportion, without replacement, so clients
        of weight 0 are never drawn.
      seed: of the run.
      round_index: from 0.
    """
    if sampling.kind == "all":
        return tuple(np.arange(count, dtype=np.int32) for count in counts)
    if sampling.kind == "schedule":
        assert sampling.schedule is not None  # the settings see to it
        return _scheduled(sampling.schedule[round_index % len(sampling.schedule)], names)
    chosen = []
    for name, count, weight in zip(names, counts, weights):
        size = _size(sampling, count)
        draws = _uniform(seed, round_index, name, count)
        if sampling.kind == "weight":
            share = np.asarray(weight[:count], np.float64)
            able = share > 0
            size = min(size, int(able.sum()))
            # Efraimidis and Spirakis: the smallest of exponential waiting times, one a client.
            waits = -np.log1p(-draws)
            draws = np.where(able, waits / np.where(able, share, 1), np.inf)
        order = np.argsort(draws, kind="stable")
        chosen.append(np.sort(order[:size]).astype(np.int32))
    return tuple(chosen)


def _size(sampling: SamplingConfig, count: int) -> int:
    if sampling.count is not None:
        return min(sampling.count, count)
    assert sampling.fraction is not None  # one of the two is set
    return max(1, min(count, round(sampling.fraction * count)))


def _uniform(seed: int, round_index: int, name: str, count: int) -> np.ndarray:
    """Draw f64[count] in [0, 1): straight from the generator's bits, which numpy keeps as they are."""
    bits = np.random.Philox(np.random.SeedSequence([seed, round_index, zlib.crc32(name.encode())]))
    return (np.asarray(bits.random_raw(count)) >> np.uint64(11)) * 2.0**-53


def _scheduled(chosen: tuple[str, ...], names: tuple[str, ...]) -> Participants:
    ids: dict[str, list[int]] = {name: [] for name in names}
    for client in chosen:
        name, _, place = client.rpartition("/")
        ids[name].append(int(place))
    return tuple(np.asarray(sorted(set(ids[name])), np.int32) for name in names)
