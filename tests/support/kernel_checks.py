"""Checks that run the package: in this process, in one with Triton's interpreter, or on a GPU.

Every function takes and returns plain values, so that it can be sent to another process.
"""

import functools
import os
from typing import Any

import numpy as np
from kernel_cases import Case, error, inputs, oracle


def strict() -> None:
    """The settings under which all of it has to work."""
    import warnings

    import jax

    warnings.simplefilter("error")
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")


def use_interpreter() -> None:
    """Start of a process whose Triton interprets."""
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["JAX_PLATFORMS"] = "cpu"
    strict()


def operands(case: Case, dtype: str, seed: int = 0) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(JAX operands, the same numbers in float64). a, core, b, bias stay float32 masters."""
    import jax.numpy as jnp

    values = inputs(case, seed)
    types = dict.fromkeys(values, jnp.float32)
    types |= dict.fromkeys(("x", "w", "dy"), jnp.dtype(dtype))
    types |= {"index": jnp.int32, "ranks": jnp.int32}
    arrays = {name: jnp.asarray(v).astype(types[name]) for name, v in values.items()}
    if case.ranks:
        # What lies at or beyond a client's rank must not matter, whatever it is.
        beyond = np.arange(case.r)[None, :] >= values["ranks"][:, None]
        arrays["a"] = jnp.where(beyond[:, None, :], jnp.nan, arrays["a"])
        arrays["b"] = jnp.where(beyond[:, :, None], jnp.nan, arrays["b"])
        if not case.size:
            lost = beyond[:, None, :] | beyond[:, :, None]
            arrays["core"] = jnp.where(lost, jnp.nan, arrays["core"])
    for name in case.shared:
        arrays[name] = arrays[name][0]
    return arrays, values


def product(case: Case, kernels: str, plan: str | None) -> Any:
    """(operands of one client, dy) -> (sum of y dy, y)."""
    import jax.numpy as jnp
    from h2tune_kernels import triple_matmul, triple_matmul_sparse

    def loss(trained: dict[str, Any], fixed: dict[str, Any]) -> Any:
        extra = {
            "scale": fixed["scale"],
            "bias": trained.get("bias"),
            "ranks": fixed["ranks"] if case.ranks else None,
            "residual": case.residual,
            "kernels": kernels,
            "plan": plan,
        }
        x, w, a, b = trained["x"], fixed["w"], trained["a"], trained["b"]
        if case.size:
            y = triple_matmul_sparse(x, w, a, trained["middle"], fixed["index"], b, **extra)
        else:
            y = triple_matmul(x, w, a, trained["core"], b, **extra)
        total = jnp.sum(y.astype(jnp.float32) * fixed["dy"].astype(jnp.float32))
        return total, y

    return loss


def split(case: Case, arrays: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    trained = ["x", "a", "b", "middle" if case.size else "core"] + ["bias"] * case.bias
    fixed = ["w", "dy", "scale", "ranks"] + ["index"] * bool(case.size)
    return {k: arrays[k] for k in trained}, {k: arrays[k] for k in fixed}


def axes(case: Case, part: dict[str, Any]) -> dict[str, int | None]:
    return {k: None if k == "w" or k in case.shared else 0 for k in part}


def errors(case: Case, dtype: str, kernels: str, plan: str | None, seed: int = 0) -> dict[str, Any]:
    """The error of y and of every gradient under jit(grad(vmap)) against the float64 oracle."""
    import jax
    import jax.numpy as jnp

    arrays, values = operands(case, dtype, seed)
    expected = oracle(case, values)
    trained, fixed = split(case, arrays)
    loss = product(case, kernels, plan)

    def total(trained: dict[str, Any], fixed: dict[str, Any]) -> Any:
        mapped = jax.vmap(loss, in_axes=(axes(case, trained), axes(case, fixed)))
        losses, y = mapped(trained, fixed)
        return jnp.sum(losses), y

    grads, y = jax.jit(jax.grad(total, has_aux=True))(trained, fixed)
    for name, grad in grads.items():
        assert grad.dtype == trained[name].dtype, name
        assert grad.shape == trained[name].shape, name
    assert y.dtype == arrays["x"].dtype
    out = {"y": error(y.astype(jnp.float32), expected["y"], True)}
    for name, grad in grads.items():
        out[name] = error(grad.astype(jnp.float32), expected[name], name not in case.shared)
    return out


def launches(case: Case, plan: str, transform: str) -> dict[str, int]:
    """How often each kernel was launched in the interpreter, for all clients together."""
    import jax
    from h2tune_kernels import interpret

    arrays, _ = operands(case, "float16")
    trained, fixed = split(case, arrays)
    loss = product(case, "triton", plan)
    fn = {
        "forward": loss,
        "backward": jax.grad(loss, has_aux=True),
        # Adapters frozen: what one half of an alternating step asks for.
        "core alone": lambda t, f: jax.grad(lambda core: loss(t | {"core": core}, f)[0])(t["core"]),
    }[transform]
    interpret.counts.clear()
    mapped = jax.jit(jax.vmap(fn, in_axes=(axes(case, trained), axes(case, fixed))))
    jax.block_until_ready(mapped(trained, fixed))
    return dict(interpret.counts)


def multiply_adds(case: Case, ranks: tuple[int, ...]) -> int:
    """Multiply-adds of all products inside the kernels, forward and backward, for given ranks."""
    import jax
    from triton.runtime.interpreter import InterpreterBuilder

    tally = 0
    original = InterpreterBuilder.create_dot

    def counting(self: Any, a: Any, b: Any, *args: Any) -> Any:
        nonlocal tally
        tally += a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
        return original(self, a, b, *args)

    InterpreterBuilder.create_dot = counting
    try:
        case = case._replace(ranks=ranks)
        arrays, _ = operands(case, "float16")
        trained, fixed = split(case, arrays)
        fn = jax.vmap(
            jax.grad(product(case, "triton", "around"), has_aux=True),
            in_axes=(axes(case, trained), axes(case, fixed)),
        )
        jax.block_until_ready(fn(trained, fixed))
    finally:
        InterpreterBuilder.create_dot = original
    return tally


def unwritten(short: bool) -> bool:
    """Whether NaN remains in y when `up` runs over its grid, or over one program fewer."""
    import dataclasses

    import jax.numpy as jnp
    from h2tune_kernels import interpret, triple_launch
    from h2tune_kernels.triple_launch import Operands

    case = Case(2, 20, 32, 150, 4)
    arrays, _ = operands(case, "float32")

    def launcher(launch: Any, *args: Any) -> Any:
        if short and launch.kernel.fn.__name__ == "up_kernel":
            launch = dataclasses.replace(launch, grid=(launch.grid[0] - 1, *launch.grid[1:]))
        return interpret.interpreter_launcher(launch, *args)

    o = Operands(
        x=arrays["x"], w=arrays["w"][None], a=arrays["a"], core=arrays["core"], positions=None,
        b=arrays["b"], bias=None, scale=arrays["scale"], ranks=None,
    )  # fmt: skip
    y, _, _ = triple_launch.forward(
        o, launcher=launcher, device="sm_90", residual=True, plan="around"
    )
    return bool(jnp.isnan(y).any())


def same_under_transforms(kernels: str, plan: str | None, sparse: bool) -> dict[str, float]:
    """Gradients by every nesting of transformations, against a loop over clients of the oracle."""
    import jax
    import jax.numpy as jnp

    case = Case(3, 11, 24, 18, 3, size=5 if sparse else 0, bias=True)
    arrays, values = operands(case, "float32")
    expected = oracle(case, values)
    del expected["y"]
    trained, fixed = split(case, arrays)
    loss = product(case, kernels, plan)
    scalar = lambda t, f: loss(t, f)[0]
    in_axes = (axes(case, trained), axes(case, fixed))
    grad = jax.grad(scalar)
    shared = {"w": fixed["w"]}
    rest = {k: v for k, v in fixed.items() if k != "w"}

    def scanned(t: Any, f: Any) -> Any:
        def step(carry: Any, one: Any) -> Any:
            return carry, grad(one[0], one[1] | shared)

        return jax.lax.scan(step, jnp.zeros(()), (t, f))[1]

    def sums(fn: Any) -> Any:
        return lambda t, f: jnp.sum(jax.vmap(fn, in_axes=in_axes)(t, f))

    def nested(t: Any, f: Any) -> Any:
        """Two seeds with a shared b each, over clients with a w shared by all."""
        inner = jax.vmap(grad, in_axes=in_axes)
        seeds = {k: jnp.stack([v, v]) for k, v in t.items() if k != "b"}

        def one(own: Any) -> Any:
            return inner(own | {"b": t["b"]}, f)

        return jax.tree.map(lambda v: v[1], jax.vmap(one)(seeds))

    def transposed(t: Any, f: Any) -> Any:
        """The operands fixed, the cotangents mapped: basis vectors rebuild the gradient."""

        def client(t: Any, f: Any) -> Any:
            y, pull = jax.vjp(lambda t: loss(t, f)[1], t)
            rows = jnp.zeros((2, *y.shape), y.dtype)
            rows = rows.at[0, : y.shape[0] // 2].set(f["dy"][: y.shape[0] // 2])
            rows = rows.at[1, y.shape[0] // 2 :].set(f["dy"][y.shape[0] // 2 :])
            (parts,) = jax.vmap(pull)(rows)
            return jax.tree.map(lambda v: jnp.sum(v, axis=0), parts)

        return jax.vmap(client, in_axes=in_axes)(t, f)

    def looped(t: Any, f: Any) -> Any:
        outs = []
        for c in range(case.clients):
            one = jax.tree.map(lambda v, c=c: v[c], (t, {k: v for k, v in f.items() if k != "w"}))
            outs.append(grad(one[0], one[1] | shared))
        return jax.tree.map(lambda *vs: jnp.stack(vs), *outs)

    ways = {
        "loop, eager": looped,
        "vmap(grad)": jax.vmap(grad, in_axes=in_axes),
        "jit(vmap(grad))": jax.jit(jax.vmap(grad, in_axes=in_axes)),
        "vmap(jit(grad))": jax.vmap(jax.jit(grad), in_axes=in_axes),
        "jit(grad(vmap))": jax.jit(jax.grad(sums(scalar))),
        "grad(vmap(remat))": jax.jit(jax.grad(sums(jax.checkpoint(scalar)))),
        "grad(remat(vmap))": jax.jit(jax.grad(jax.checkpoint(sums(scalar)))),
        "scan(grad)": lambda t, f: jax.jit(scanned)(t, rest),
        "vmap(vmap(grad))": jax.jit(nested),
        "vmap(vjp)": jax.jit(transposed),
    }
    out = {}
    for name, way in ways.items():
        grads = way(trained, fixed)
        out[name] = max(error(grads[k], expected[k], True) for k in grads)
    return out


def core_round_trip(kernels: str) -> None:
    """Gather and scatter: exact against numpy, each the other's transpose, under batches."""
    import jax
    import jax.numpy as jnp
    from h2tune_kernels import scatter_core, sparse_core
    from kernel_cases import positions

    rng = np.random.default_rng(3)
    take = functools.partial(sparse_core, kernels=kernels)
    for r, size in ((1, 1), (3, 3), (5, 9), (33, 64)):
        middle = rng.standard_normal((2, 3, size, size)).astype(np.float32)
        core = rng.standard_normal((2, 3, r, r)).astype(np.float32)
        index = np.stack([positions(rng, size, r) for _ in range(6)]).reshape(2, 3, r * r)
        taken = np.take_along_axis(middle.reshape(2, 3, -1), index, axis=-1).reshape(core.shape)
        put = np.zeros((2, 3, size * size), np.float32)
        np.put_along_axis(put, index, core.reshape(2, 3, -1), axis=-1)
        put = put.reshape(middle.shape)
        m, k, i = jnp.asarray(middle), jnp.asarray(core), jnp.asarray(index)
        give = functools.partial(scatter_core, size=size, kernels=kernels)
        for fn, args, expected in (
            (take, (m, i), taken),
            (jax.vmap(jax.vmap(take)), (m, i), taken),
            (jax.jit(jax.vmap(take)), (m, i), taken),
            (give, (k, i), put),
            (jax.vmap(jax.vmap(give)), (k, i), put),
        ):
            np.testing.assert_array_equal(np.asarray(fn(*args)), expected)
        # One index for all, and one matrix for all.
        np.testing.assert_array_equal(
            np.asarray(take(m, i[0, 0])),
            middle.reshape(2, 3, -1)[:, :, index[0, 0]].reshape(core.shape),
        )
        np.testing.assert_array_equal(
            np.asarray(jax.vmap(take, in_axes=(None, 0))(m[0, 0], i[0])),
            np.take_along_axis(middle[:1, :1].reshape(1, -1), index[0], axis=-1).reshape(3, r, r),
        )
        # The gradient of one is the other, bit for bit; a shared operand gets the sum.
        (pulled,) = jax.vjp(functools.partial(take, index=i), m)[1](k)
        np.testing.assert_array_equal(np.asarray(pulled), put)
        (pulled,) = jax.vjp(functools.partial(give, index=i), k)[1](m)
        np.testing.assert_array_equal(np.asarray(pulled), taken)
        (pulled,) = jax.vjp(functools.partial(take, index=i[0]), m[0, 0])[1](k[0])
        np.testing.assert_allclose(np.asarray(pulled), put[0].sum(axis=0), rtol=1e-6, atol=1e-6)
