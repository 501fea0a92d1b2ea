"""torch + peft, a fresh Python process per client per round, as H2Tune's public code does it.

Each process loads the base from disk, the adapters that the server left, trains, and saves what it has
learned; the server, this process, averages the files. Processes run one after the other, so a round's
time is proportional to its clients, and fewer of them (`--clients`) measure the same.
"""

import work

if __name__ == "__main__":
    ARGS = work.parse(steps=4, client=-1, folder="", total=16)

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import lora_work
import torch
import torch_lora

SERVER = "server.pt"


def run_client(args):
    """One client's part of a round, in a process of its own."""
    torch.set_num_threads(args.threads)
    folder, own = Path(args.folder), Path(args.folder) / f"client{args.client}.pt"
    model, head = torch_lora.load_model(), torch_lora.make_head()
    if own.exists():
        head.load_state_dict(torch.load(own)["head"])
    parameters = [parameter for *_, parameter in torch_lora.layers_of(model)]
    for parameter, value in zip(parameters, torch.load(folder / SERVER)):
        parameter.data.copy_(value)
    data = lora_work.make_data(args.total, args.steps)
    ids, labels = (torch.from_numpy(leaf[args.client]).long() for leaf in data)
    loss = torch_lora.train(model, head, ids, labels)
    model.save_pretrained(folder / f"adapter{args.client}")
    factors = [parameter.detach() for parameter in parameters]
    torch.save({"head": head.state_dict(), "factors": factors, "loss": loss}, own)


def run_round(args, folder):
    """One round: -> the clients' mean loss."""
    results = []
    for client in range(args.clients):
        command = [sys.executable, __file__, "--client", str(client), "--folder", str(folder)]
        for name in ("clients", "steps", "threads", "total"):
            command += [f"--{name}", str(getattr(args, name))]
        subprocess.run(command, check=True)
        results.append(torch.load(folder / f"client{client}.pt"))
    stacked = zip(*(result["factors"] for result in results))
    torch.save([torch.stack(values).mean(dim=0) for values in stacked], folder / SERVER)
    return sum(result["loss"] for result in results) / len(results)


def main(args):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = torch_lora.load_model()
        torch_lora.put_factors(model, lora_work.make_start())
        start = [parameter.detach() for *_, parameter in torch_lora.layers_of(model)]
        torch.save(start, folder / SERVER)
        seconds, check = [], None
        for index in range(2 + args.rounds):
            began = time.perf_counter()
            loss = run_round(args, folder)
            seconds.append(time.perf_counter() - began)
            check = loss if index == 1 else check
    tokens = args.clients * args.steps * lora_work.TOKENS_A_STEP
    work.report("process per client", args, seconds[2:], check, steps=args.steps, tokens=tokens)


if __name__ == "__main__":
    if ARGS.client >= 0:
        run_client(ARGS)
    else:
        main(ARGS)
