"""The dry run's account of a federation, against counts by hand and against a real round."""

import logging
import re

import jax
import numpy as np
import pytest
import tiny_run

import h2tune_jax as h2
from h2tune_jax.run.catalog import build_method
from h2tune_jax.run.config import PruneConfig, make_config, parse_config
from h2tune_jax.run.describe import count_sampled, describe, format_description
from h2tune_jax.run.federation import build_federation
from h2tune_jax.types import FederationError


def local(folder, *overrides):
    text = tiny_run.TOML.replace('name = "h2tune"', 'name = "local"')
    return parse_config(text.replace("lambda_norm = 1e-3", ""), overrides, folder=folder)


def test_counts_by_hand(folder):
    narrow, wide = describe(local(folder)).groups
    # A LoRA of rank 2 on q (8 x 8) and up (8 x 12) in two layers; a head of 8 x 3 with bias.
    assert narrow.adapter == 2 * (2 * (8 + 8) + 2 * (8 + 12))
    assert narrow.head == 8 * 3 + 3
    assert wide.adapter == 3 * 4 * (12 + 12)
    assert (narrow.clients, narrow.sampled, narrow.labels) == (2, 2, 3)
    assert (narrow.examples, narrow.steps, wide.examples, wide.steps) == ("12", "3", "8", "2")
    assert narrow.targets == ("q", "up")
    assert (narrow.bytes_up, narrow.bytes_down) == (0, 0)  # `local` shares nothing


def test_agrees_with_a_real_round(folder):
    config = tiny_run.tiny_config(folder)
    what = describe(config)
    federation, method = build_federation(config), build_method(config)
    state = h2.init_round(method, federation.specs, federation.bases, None, jax.random.key(0))
    total = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    assert what.memory["frozen bases"] == total(federation.bases)
    assert what.memory["clients' state"] == total(state.clients)
    assert what.memory["server's state"] == total(state.server)
    # Clients of a group are tested on the same rows, which are there once.
    tested = [jax.tree.map(lambda leaf: leaf[0], data.examples) for data in federation.test]
    counted = [data.num_examples for data in federation.test]
    assert what.memory["data"] == total((federation.train, tested, counted))
    # At most the client's kinds of G travel: L slots x Ki kinds x R x R, in float32.
    assert [group.bytes_up for group in what.groups] == [3 * 2 * 16 * 4, 3 * 1 * 16 * 4]
    assert what.bytes_up == 2 * 384 + 3 * 192
    assert what.memory_total == sum(what.memory.values())


@pytest.mark.parametrize(
    ("method", "options", "up", "down"),
    [
        # A and B of rank 2: two layers of q and up (8 x 8, 8 x 12).
        ("fedit", {}, 2 * 2 * (16 + 20), 2 * 2 * (16 + 20)),
        # A is drawn once and sent at first contact.
        ("ffa_lora", {}, 2 * 2 * (8 + 12), 2 * 2 * (8 + 12)),
        # L x Ki x R x R; neither the basis, sent at first contact, nor the mean beside a G of its own.
        # Up go the entries that were selected, all at most, and a signature: a number a text, and one.
        ("h2tune", {"preset": "common", "shared_rank": 8, "core_rank": 8}, 2 * 2 * 64 + 5, 2 * 2 * 64),
        # At most, as ranks may shrink.
        ("hetlora", {}, 2 * 2 * (16 + 20), 2 * 2 * (16 + 20)),
    ],
)  # fmt: skip
def test_traffic_leaves_out_what_is_sent_once(folder, method, options, up, down):
    settings = tiny_run.tiny_config(folder).model_dump()
    probe = {"data": str(folder / "words.jsonl"), "count": 4, "max_length": 12}
    config = make_config({
        **settings, "groups": settings["groups"][:1], "probe": probe,
        "method": {"name": method, **options},
    })  # fmt: skip
    (group,) = describe(config).groups
    assert group.bytes_down == 4 * down
    assert group.bytes_up == 4 * up


def test_no_program_of_the_federation_is_compiled(folder, caplog):
    config = tiny_run.tiny_config(folder)
    with jax.log_compiles(), caplog.at_level(logging.DEBUG, logger="jax"):
        describe(config)
        names = {record.args[0] for record in caplog.records if "Compiling" in record.msg}
        # Placing a number on the device counts as a program; nothing else is there.
        assert names <= {"jit(convert_element_type)", "jit(stage)", "jit(_threefry_seed)"}
        jax.jit(lambda x: x + 1)(np.ones(3, np.float32))
        assert any("lambda" in str(record.args) for record in caplog.records)


def test_microbatches_and_the_client_axis_move_the_estimate(folder):
    step = lambda *changes: describe(local(folder, *changes)).memory["one training step"]
    whole = step("groups.*.budget.batch_size=4")
    assert step("groups.*.budget.batch_size=8") > 1.5 * whole
    assert step("groups.*.budget.batch_size=8", "groups.*.budget.microbatches=2") == whole
    assert step("engine.client_axis=vmap") > step("engine.client_axis=2") > whole


def test_pruned_groups_are_what_they_are_when_loaded(folder):
    """Two groups on one pruned model, one on another of its depths: all have the same embeddings."""
    narrow = local(folder).groups[0]
    depths = ({"first": 1}, {"first": 1}, {"layers": (1,)}, None)
    groups = tuple(
        narrow.model_copy(
            update={
                "name": f"g{i}",
                "model": narrow.model.model_copy(
                    update={"prune": None if depth is None else PruneConfig(**depth)}
                ),
            }
        )
        for i, depth in enumerate(depths)
    )
    config = local(folder).model_copy(update={"groups": groups})
    bases = build_federation(config).bases
    distinct = {id(leaf): leaf.nbytes for leaf in jax.tree.leaves(bases)}
    layers = {id(leaf): leaf.nbytes for base in bases for leaf in jax.tree.leaves(base["layers"])}
    rest = sum(leaf.nbytes for leaf in jax.tree.leaves({**bases[0], "layers": None}))
    # A whole model of two layers, and one layer twice.
    assert sum(layers.values()) == 2 * sum(
        leaf.nbytes for leaf in jax.tree.leaves(bases[3]["layers"])
    )
    assert sum(distinct.values()) == rest + sum(layers.values())
    assert describe(config).memory["frozen bases"] == sum(distinct.values())


def test_pruned_groups_are_counted_once(folder):
    apart = local(folder)
    group = apart.groups[0]
    twin = group.model_copy(update={"name": "twin"})
    twice = apart.model_copy(update={"groups": (group, twin)})
    once = apart.model_copy(update={"groups": (group,)})
    assert describe(twice).memory["frozen bases"] == describe(once).memory["frozen bases"]


def test_a_store_off_the_device_holds_the_sampled_twice(folder):
    sampled = ("sampling.kind=uniform", "sampling.count=1")
    device = describe(local(folder, *sampled)).memory["clients' state"]
    host = describe(local(folder, *sampled, "store.kind=host")).memory["clients' state"]
    (narrow, wide) = describe(local(folder)).groups
    own = lambda group: 4 * (group.adapter + group.head)
    assert device == 2 * own(narrow) + 3 * own(wide)
    assert host == 2 * (own(narrow) + own(wide))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ((), [2, 3]),
        (("sampling.kind=uniform", "sampling.count=2"), [2, 2]),
        (("sampling.kind=weight", "sampling.fraction=0.3"), [1, 1]),
        (("evaluation.newcomers={count=1, steps=2}",), [1, 2]),
        (("sampling.kind=schedule", "sampling.schedule=[['wide/0', 'wide/1'], ['narrow/0']]"), [0.5, 1]),
    ],
)  # fmt: skip
def test_participants(folder, changes, expected):
    config = tiny_run.tiny_config(folder, *changes)
    assert [count_sampled(config, group) for group in config.groups] == expected


def test_text(folder):
    text = format_description(
        describe(tiny_run.tiny_config(folder, "sampling.kind=uniform", "sampling.count=2"))
    )
    for words in (
        "tiny: h2tune, 3 rounds, seed 3, 5 clients in 2 groups",
        "narrow: 2 clients, all a round",
        "wide: 3 clients, 2 a round",
        "bert, 3 x 12",
        "words.jsonl, classification (3 labels); 12 examples and 3 steps a client and round, 8 to test on",
        "rank 4 on q: 336 parameters a client, and 26 of its head",
        "memory on the device, estimated:",
    ):
        assert words in text


def test_what_does_not_fit_is_said_of_the_group(folder):
    lines = format_description(
        describe(local(folder, "groups.wide.task.max_length=9"))
    ).splitlines()
    (line,) = [line for line in lines if "cut" in line]
    assert re.fullmatch(
        r"  length     (\d+) of 38 texts cut to 9 tokens, by \1 tokens in all", line
    )
    assert lines.index(line) > lines.index("wide: 3 clients, all a round")


def test_what_the_engine_would_refuse_is_refused(folder):
    with pytest.raises(FederationError, match="cohort 'narrow'"):
        describe(tiny_run.tiny_config(folder, "method.shared_rank=1"))
