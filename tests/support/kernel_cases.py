"""Problems for the triple product: shapes off the block sizes, inputs, and a float64 oracle.

Nothing here knows the package under test. The oracle goes another way than the kernels do: it
builds the weight W + s A (I + T) B and differentiates through that.
"""

import math
from typing import Any, NamedTuple

import numpy as np

# Relative error allowed, by dtype of x: of the norm per client, and a tenth of it by the largest
# element over the root mean square.
TOLERANCE = {"float32": 5e-6, "float16": 2e-3, "bfloat16": 1.6e-2}


class Case(NamedTuple):
    clients: int
    n: int
    d: int
    f: int
    r: int
    size: int = 0  # R of the middle matrix; 0: the core is given
    ranks: tuple[int, ...] = ()
    bias: bool = False
    residual: bool = True
    shared: tuple[str, ...] = ()  # operands without a client axis, beside w

    @property
    def name(self) -> str:
        parts = [f"C{self.clients}", f"n{self.n}", f"D{self.d}", f"F{self.f}", f"r{self.r}"]
        parts += [f"R{self.size}"] if self.size else []
        parts += ["ranks" + "_".join(map(str, self.ranks))] if self.ranks else []
        parts += ["bias"] if self.bias else []
        parts += [] if self.residual else ["pure"]
        parts += ["shared_" + "_".join(self.shared)] if self.shared else []
        return "-".join(parts)


CASES = (
    Case(1, 1, 16, 16, 1),
    Case(3, 19, 40, 37, 5, size=9, bias=True),
    Case(7, 33, 65, 130, 8, ranks=(1, 8, 3, 8, 2, 7, 0)),
    Case(2, 70, 96, 264, 16, residual=False, bias=True),
    Case(1, 130, 129, 257, 17, size=31, residual=False),
    Case(5, 17, 80, 72, 64, ranks=(4, 64, 33, 16, 17), bias=True),
    Case(2, 21, 72, 90, 128, size=130),
    Case(2, 40, 48, 50, 100, size=101, ranks=(100, 20)),
    Case(4, 9, 34, 70, 33, shared=("x",)),
    Case(3, 35, 30, 31, 3, size=7, shared=("a", "b", "bias", "index"), bias=True),
)


def positions(rng: np.random.Generator, size: int, r: int) -> np.ndarray:
    """r*r distinct flat positions in a [size, size] matrix, rising."""
    return np.sort(rng.permutation(size * size)[: r * r]).astype(np.int32)


def inputs(case: Case, seed: int = 0) -> dict[str, np.ndarray]:
    """Operands [C, ...] in float64 on a grid that every 16-bit dtype holds exactly."""
    rng = np.random.default_rng(seed)
    c, n, d, f, r, size = case.clients, case.n, case.d, case.f, case.r, case.size

    def draw(*shape: int, spread: float = 1.0) -> np.ndarray:
        coarse = np.round(rng.uniform(-1, 1, shape) * 64) / 64
        return coarse * 2.0 ** round(math.log2(spread))

    out = {
        "x": draw(c, n, d),
        "w": draw(d, f, spread=d**-0.5),
        "a": draw(c, d, r, spread=d**-0.5),
        "core": draw(c, r, r, spread=r**-0.5),
        "b": draw(c, r, f, spread=r**-0.5),
        "bias": draw(c, f),
        "dy": draw(c, n, f),
        "scale": np.round(rng.uniform(0.5, 2, (c,)) * 8) / 8,
        "ranks": np.array(case.ranks or (r,) * c, np.int32),
    }
    if size:
        out["middle"] = draw(c, size, size, spread=r**-0.5)
        out["index"] = np.stack([positions(rng, size, r) for _ in range(c)])
    for name in case.shared:
        out[name] = np.broadcast_to(out[name][:1], out[name].shape).copy()
    return out


def oracle(case: Case, v: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """y and every gradient, in float64, one client at a time."""
    names = ["y", "x", "a", "b", "bias", "middle" if case.size else "core"]
    out: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for c in range(case.clients):
        rank, r, s = int(v["ranks"][c]), case.r, float(v["scale"][c])
        core = v["core"][c]
        if case.size:
            core = v["middle"][c].reshape(-1)[v["index"][c]].reshape(r, r)
        live = (np.arange(r) < rank).astype(np.float64)
        a = v["a"][c] * live[None, :]
        b = v["b"][c] * live[:, None]
        mix = core * live[:, None] * live[None, :]
        if case.residual:
            mix = mix + np.diag(live)
        x, dy, w = v["x"][c], v["dy"][c], v["w"]
        weight = w + s * a @ mix @ b
        pull = s * x.T @ dy  # dL/d(A mix B)
        dcore = (a.T @ pull @ b.T) * live[:, None] * live[None, :]
        out["y"].append(x @ weight + (v["bias"][c] if case.bias else 0.0))
        out["x"].append(dy @ weight.T)
        out["a"].append((pull @ (mix @ b).T) * live[None, :])
        out["b"].append(((a @ mix).T @ pull) * live[:, None])
        out["bias"].append(dy.sum(axis=0))
        if case.size:
            middle = np.zeros(case.size**2)
            middle[v["index"][c]] = dcore.reshape(-1)
            out["middle"].append(middle.reshape(case.size, case.size))
        else:
            out["core"].append(dcore)
    stacked = {name: np.stack(values) for name, values in out.items()}
    for name in case.shared:
        if name in stacked:
            stacked[name] = stacked[name].sum(axis=0)
    if not case.bias:
        del stacked["bias"]
    return stacked


def error(value: Any, expected: np.ndarray, batched: bool) -> float:
    """The larger of: norm of the error over norm; largest error over ten root mean squares."""
    value = np.asarray(value, np.float64)
    assert value.shape == expected.shape, (value.shape, expected.shape)
    if not batched:
        value, expected = value[None], expected[None]
    worst = 0.0
    for got, want in zip(value, expected, strict=True):
        difference = np.abs(got - want)
        if not np.isfinite(difference).all():
            return math.inf
        norm = np.linalg.norm(want)
        if norm == 0.0:
            worst = max(worst, math.inf if difference.max() > 0 else 0.0)
            continue
        root = norm / math.sqrt(want.size)
        worst = max(worst, float(np.linalg.norm(difference) / norm), difference.max() / root / 10)
    return worst
