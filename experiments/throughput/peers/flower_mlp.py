# ruff: noqa: E402 - the process is pinned before anything starts threads
"""Flower 1.41 simulation (Ray): its FedAvg; the clients are `flower_client.py`.

A numpy client starts faster than a torch one, so what is seen is Flower's own cost as far as can be. With
`--threads n` Ray runs n clients at a time, of one core each.
"""

import os

import work

ARGS = work.parse()
os.environ.update(FLWR_TELEMETRY_ENABLED="0", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0")
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"

import logging
import time

import flower_client
import numpy as np
from flwr.app import ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

NAMES = ("w1", "b1", "w2", "b2")
server_app = ServerApp()


def run(grid, clients, rounds):
    """Run FedAvg: -> (the model, seconds of every round)."""
    times, models = [], []

    def evaluate(server_round, arrays):
        times.append(time.perf_counter())
        models.append(arrays)

    strategy = FedAvg(
        fraction_train=clients / work.CLIENTS,
        fraction_evaluate=0.0,
        min_available_nodes=work.CLIENTS,
    )
    start = ArrayRecord([work.make_start()[name] for name in NAMES])
    strategy.start(grid=grid, initial_arrays=start, num_rounds=rounds, evaluate_fn=evaluate)
    return dict(zip(NAMES, models[-1].to_numpy_ndarrays())), np.diff(times).tolist()


@server_app.main()
def main(grid, context):
    model, _ = run(grid, work.CLIENTS, 1)
    _, seconds = run(grid, ARGS.clients, work.SKIPPED + ARGS.rounds)
    work.report("Flower", ARGS, seconds[work.SKIPPED :], work.mean_loss(model))


if __name__ == "__main__":
    logging.getLogger("flwr").setLevel(logging.ERROR)
    run_simulation(
        server_app=server_app,
        client_app=flower_client.app,
        num_supernodes=work.CLIENTS,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": ARGS.threads},
        },
    )
