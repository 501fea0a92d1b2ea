"""Flower's client: five steps in numpy. A module of its own, since Ray sends functions by their names."""

import functools

import numpy as np
import work
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()
data = functools.cache(work.make_data)  # once a Ray worker


@app.train()
def train(message, context):
    w1, b1, w2, b2 = (leaf.copy() for leaf in message.content["arrays"].to_numpy_ndarrays())
    x_all, y_all = (leaf[int(context.node_config["partition-id"])] for leaf in data())
    for first in range(0, work.EXAMPLES, work.BATCH):
        x, y = x_all[first : first + work.BATCH], y_all[first : first + work.BATCH]
        before = x @ w1 + b1
        hidden = np.maximum(before, 0)
        grad = hidden @ w2 + b2
        grad = np.exp(grad - grad.max(axis=1, keepdims=True))
        grad /= grad.sum(axis=1, keepdims=True)
        grad[np.arange(len(y)), y] -= 1
        grad /= len(y)
        back = grad @ w2.T
        back[before <= 0] = 0
        w2 -= work.RATE * (hidden.T @ grad)
        b2 -= work.RATE * grad.sum(axis=0)
        w1 -= work.RATE * (x.T @ back)
        b1 -= work.RATE * back.sum(axis=0)
    metrics = MetricRecord({"num-examples": work.EXAMPLES})
    content = RecordDict({"arrays": ArrayRecord([w1, b1, w2, b2]), "metrics": metrics})
    return Message(content=content, reply_to=message)
