"""torch + peft: one model in memory, client after client."""

import work

if __name__ == "__main__":
    ARGS = work.parse(steps=4)

import lora_work
import peft
import torch
import transformers

MODULES = {"q": "query", "v": "value"}


def load_model(device="cpu"):
    """MiniLM with fresh adapters; dropout is off everywhere, as in the other program."""
    transformers.logging.set_verbosity_error()
    encoder = transformers.BertModel.from_pretrained(lora_work.ASSET, add_pooling_layer=False)
    config = peft.LoraConfig(
        r=lora_work.RANK,
        lora_alpha=lora_work.ALPHA,
        lora_dropout=0.0,
        target_modules=list(MODULES.values()),
    )
    return peft.get_peft_model(encoder, config).eval().to(device)


def layers_of(model):
    """Give (factor, site, layer, parameter) of every adapter; peft keeps them transposed."""
    for layer, block in enumerate(model.base_model.model.encoder.layer):
        for site, name in MODULES.items():
            module = getattr(block.attention.self, name)
            yield "a", site, layer, module.lora_A["default"].weight
            yield "b", site, layer, module.lora_B["default"].weight


@torch.no_grad()
def put_factors(model, given):
    """Write {"a": {site: [Li, D, r]}, "b": ...} into the adapters."""
    for part, site, layer, parameter in layers_of(model):
        parameter.copy_(torch.as_tensor(given[part][site][layer]).T)


def make_head(device="cpu"):
    """Build the common start of every client's classifier."""
    given = lora_work.make_start()
    head = torch.nn.Linear(lora_work.WIDTH, lora_work.CLASSES).to(device)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(given["w"].T.copy()))
        head.bias.copy_(torch.from_numpy(given["bias"]))
    return head


def train(model, head, ids, labels):
    """One client's steps of a round: -> its mean loss."""
    parameters = [parameter for *_, parameter in layers_of(model)]
    optimizer = torch.optim.Adam([*parameters, *head.parameters()], lora_work.RATE)
    mask, losses = torch.ones_like(ids[: lora_work.BATCH]), []
    for first in range(0, len(ids), lora_work.BATCH):
        rows = slice(first, first + lora_work.BATCH)
        hidden = model(input_ids=ids[rows], attention_mask=mask).last_hidden_state
        loss = torch.nn.functional.cross_entropy(head(hidden.mean(dim=1)), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return float(torch.stack(losses).mean())


def build(args):
    """(start, round_fn) as `lora_work.measure` wants them."""
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("high")  # on CUDA as JAX multiplies by default
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(device)
    ids, labels = (
        torch.from_numpy(leaf).long().to(device)
        for leaf in lora_work.make_data(args.clients, args.steps)
    )
    parameters = [parameter for *_, parameter in layers_of(model)]

    def start():
        put_factors(model, lora_work.make_start())
        return [make_head(device) for _ in range(args.clients)]

    def round_fn(heads):
        sent = [p.detach().clone() for p in parameters]
        total, losses = [torch.zeros_like(p) for p in sent], []
        for client, head in enumerate(heads):
            for p, s in zip(parameters, sent):
                p.data.copy_(s)
            losses.append(train(model, head, ids[client], labels[client]))
            for t, p in zip(total, parameters):
                t.add_(p.data)
        for p, t in zip(parameters, total):
            p.data.copy_(t / args.clients)
        return heads, sum(losses) / len(losses)

    return start, round_fn


if __name__ == "__main__":
    lora_work.measure("torch + peft", ARGS, *build(ARGS))
