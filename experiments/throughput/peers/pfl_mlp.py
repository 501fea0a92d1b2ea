# ruff: noqa: E402 - the process is pinned before anything starts threads
"""pfl 0.6.0: its FederatedAveraging in the simulated backend, torch models."""

import work

ARGS = work.parse()

import time

import numpy as np
import torch

torch.set_num_threads(ARGS.threads)

from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByUser
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch_mlp import module_of, params_of


class Network(torch.nn.Module):
    """What pfl asks of a torch model."""

    def __init__(self):
        super().__init__()
        self.layers = module_of(work.make_start())

    def loss(self, x, y, eval=False):
        self.train(not eval)
        return torch.nn.functional.cross_entropy(self.layers(x), y)

    @torch.no_grad()
    def metrics(self, x, y, eval=True):
        return {"loss": Weighted(float(self.loss(x, y, eval)) * len(y), len(y))}


class Clock(TrainingProcessCallback):
    """Notes when every round ends."""

    def __init__(self):
        self.times = [time.perf_counter()]

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        self.times.append(time.perf_counter())
        return False, Metrics()


def train(clients, rounds, next_user):
    """Run FedAvg: -> (the trained network, seconds of every round)."""
    x, y = (torch.from_numpy(leaf) for leaf in work.make_data())
    users = {i: (x[i], y[i].long()) for i in range(work.CLIENTS)}
    data = FederatedDataset(lambda user: Dataset(users[user], user_id=str(user)), next_user)
    network = Network()
    model = PyTorchModel(
        network,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(network.parameters(), 1.0),
    )
    clock = Clock()
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=rounds,
            evaluation_frequency=10**6,
            train_cohort_size=clients,
            val_cohort_size=0,
        ),
        backend=SimulatedBackend(
            training_data=data, val_data=data, postprocessors=[WeightByUser()]
        ),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_learning_rate=work.RATE, local_num_epochs=1, local_batch_size=work.BATCH
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=work.EXAMPLES),
        callbacks=[clock],
    )
    return network, np.diff(clock.times).tolist()


def main():
    in_order = iter(list(range(work.CLIENTS)) * 2)
    network, _ = train(work.CLIENTS, 1, lambda: next(in_order))
    check = work.mean_loss(params_of(network.layers))
    rng = np.random.default_rng(2)
    rounds = work.SKIPPED + ARGS.rounds
    draws = [rng.choice(work.CLIENTS, ARGS.clients, replace=False) for _ in range(rounds + 1)]
    sampled = iter(np.concatenate(draws).tolist())
    _, seconds = train(ARGS.clients, rounds, lambda: next(sampled))
    work.report("pfl", ARGS, seconds[work.SKIPPED :], check)


if __name__ == "__main__":
    main()
