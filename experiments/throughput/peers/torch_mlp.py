# ruff: noqa: E402 - the process is pinned before anything starts threads
"""FedAvg in torch by hand, client after client."""

import work

ARGS = work.parse()

import torch

torch.set_num_threads(ARGS.threads)


def module_of(params):
    """Build the MLP with the given weights; torch keeps them transposed."""
    module = torch.nn.Sequential(
        torch.nn.Linear(work.FEATURES, work.HIDDEN),
        torch.nn.ReLU(),
        torch.nn.Linear(work.HIDDEN, work.CLASSES),
    )
    names = ("w1", "b1", "w2", "b2")
    with torch.no_grad():
        for parameter, name in zip(module.parameters(), names):
            parameter.copy_(torch.from_numpy(params[name].T.copy()))
    return module


def params_of(module):
    leaves = [p.detach().numpy().T for p in module.parameters()]
    return dict(zip(("w1", "b1", "w2", "b2"), leaves))


def build():
    x, y = (torch.from_numpy(leaf) for leaf in work.make_data())
    y = y.long()

    def round_fn(module, ids):
        start = [p.detach().clone() for p in module.parameters()]
        total = [torch.zeros_like(p) for p in start]
        optimizer = torch.optim.SGD(module.parameters(), work.RATE)
        for i in ids:
            for p, s in zip(module.parameters(), start):
                p.data.copy_(s)
            for first in range(0, work.EXAMPLES, work.BATCH):
                rows = slice(first, first + work.BATCH)
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(module(x[i, rows]), y[i, rows]).backward()
                optimizer.step()
            for t, p in zip(total, module.parameters()):
                t.add_(p.data)
        for p, t in zip(module.parameters(), total):
            p.data.copy_(t / len(ids))
        return module

    return lambda: module_of(work.make_start()), round_fn, params_of


if __name__ == "__main__":
    work.measure("bare torch loop", ARGS, *build())
