"""Low-rank adapters: what they compute, how they train, and what they cost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_config
import tiny_model
from conftest import random_tokens
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from opsd_jax import losses
from opsd_jax.losses import Head
from opsd_jax.models import decoder, lora
from opsd_jax.models.lora import LoRA, LoRAOptions, Weights
from opsd_jax.options import ConfigError
from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.policy import Matrix
from opsd_jax.training import state as state_lib
from opsd_jax.training.step import make_train_step

# The longest sums have 176 terms, each rounded to float32, and are added in another order.
ROUNDING = 176 * 2.0**-24
EVERY = ("down", "gate", "k", "o", "q", "up", "v")


def bound(model, **options):
    """Returns the adapter of a model, with the shapes of its parameters."""
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return LoRA(LoRAOptions(kind="lora", **options), model, shapes, "a:make")


@pytest.fixture(scope="module")
def small():
    return decoder.from_config(tiny_config.decoder(num_layers=2, scan_unroll=1))


@pytest.fixture(scope="module")
def base(small):
    return jax.jit(small.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def tokens():
    return random_tokens(0, (4, 24))


def random_adapter(adapter, seed=1):
    """Returns an adapter whose B is not 0."""
    found = adapter.init(jax.random.key(seed))
    keys = iter(jax.random.split(jax.random.key(seed + 1), len(found)))
    return {
        name: {**pair, "b": 0.1 * jax.random.normal(next(keys), pair["b"].shape)}
        for name, pair in found.items()
    }


def loss_of(policy, tokens, params):
    """Returns the mean cross-entropy of the next token, in the fused form."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = policy.forward(params, tokens, positions)[0]
    mask = jnp.ones(tokens[:, 1:].shape, bool)
    head = Head(policy.unembed, params, hidden[:, :-1])
    found = losses.sft(student=head, tokens=tokens[:, 1:], mask=mask, chunk=8)
    return found.sum / found.weight


def test_factors_and_their_sum_with_the_matrix_compute_the_same(small, base, tokens):
    adapter = bound(small, rank=4, alpha=6.0)
    assert {*adapter.matrices} == {f"layers/{name}" for name in EVERY}
    factors = random_adapter(adapter)
    loss = functools.partial(loss_of, small.policy, tokens)
    apart = jax.value_and_grad(lambda f: loss(adapter.applied(base, f)))(factors)
    summed = jax.value_and_grad(lambda f: loss(adapter.merged(Weights(base, f))))(factors)
    for x, y in zip(jax.tree.leaves(apart), jax.tree.leaves(summed), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=ROUNDING * float(jnp.abs(y).max()))
    assert abs(apart[0] - loss(base)) > 1e-3
    through = functools.partial(loss_of, adapter.policy, tokens)
    assert through(Weights(base, factors)) == pytest.approx(float(apart[0]), rel=1e-6)


def test_the_sum_is_weight_plus_scaled_product(small, base):
    """Compares with NumPy in float64, matrix by matrix."""
    adapter = bound(small, rank=4, alpha=6.0)
    factors = random_adapter(adapter)
    merged = adapter.merged(Weights(base, factors))
    for name, pair in factors.items():
        leaf = name.removeprefix("layers/")
        weight, got = (np.float64(tree["layers"][leaf]) for tree in (base, merged))
        a, b = np.float64(pair["a"]), np.float64(pair["b"])
        for layer in range(2):
            product = a[layer].reshape(-1, 4) @ b[layer].reshape(4, -1)
            expected = weight[layer] + 1.5 * product.reshape(weight[layer].shape)
            np.testing.assert_allclose(got[layer], expected, rtol=0, atol=1e-6)
    untouched = [merged["embedding"], merged["layers"]["q_norm"], merged["head"]]
    for x, y in zip(
        untouched, [base["embedding"], base["layers"]["q_norm"], base["head"]], strict=True
    ):
        assert x is y


def test_a_new_adapter_changes_no_bit(small, base, tokens):
    adapter = bound(small, rank=4)
    new = adapter.init(jax.random.key(3))
    loss = jax.jit(functools.partial(loss_of, small.policy, tokens))
    assert loss(adapter.applied(base, new)) == loss(base)
    assert adapter.applied(base, None) is base
    for x, y in zip(
        jax.tree.leaves(adapter.merged(Weights(base, new))), jax.tree.leaves(base), strict=True
    ):
        np.testing.assert_array_equal(x, y)
    # As in PEFT, A is uniform in (-1, 1) / sqrt(inputs).
    a = new["layers/down"]["a"]
    assert a.dtype == jnp.float32
    assert float(jnp.abs(a).max()) <= 176**-0.5
    assert float(a.std()) == pytest.approx(176**-0.5 / 3**0.5, rel=0.05)
    # The values of a matrix do not depend on which others are adapted.
    alone = bound(small, rank=4, targets=("layers/down",)).init(jax.random.key(3))
    np.testing.assert_array_equal(alone["layers/down"]["a"], a)


def test_full_rank_trains_like_all_parameters(small, base, tokens):
    """At full rank, the loss curve of SGD is that of training the same matrices.

    With A = c times an orthonormal matrix and B = 0, a step of SGD changes a matrix by c^2 times
    what it does without an adapter. The change of A has an effect through B only, which is smaller
    by 1 / c^2.
    """
    names = ("layers/gate", "layers/o", "layers/q")  # none has more inputs than outputs
    rate, c, steps = 0.3, 30.0, 20
    batch = ({"count": np.int32(1), "rows": {"tokens": np.asarray(tokens)[None]}},)

    def curve(params, optimizer, joined=None, base=None):
        def loss(params, teacher, rows):
            return loss_of(small.policy, rows["tokens"], params), (jnp.float32(1), {})

        step = jax.jit(make_train_step(loss, optimizer, joined=joined))
        state, found = state_lib.init_state(params, optimizer), []
        for _ in range(steps):
            state, metrics = step(state, batch, base)
            found.append(float(metrics["loss"][0]))
        return np.array(found)

    others = jax.tree_util.tree_map_with_path(
        lambda path, _: mesh_lib.path_name(path) not in names, base
    )
    only = optax.chain(optax.sgd(rate), optax.masked(optax.set_to_zero(), others))
    expected = curve(base, only)
    assert expected[-1] < expected[0] - 0.3

    adapter = bound(small, rank=64, alpha=64.0, targets=names)
    factors = adapter.init(jax.random.key(1))
    for name in names:
        a = factors[name]["a"]
        factors[name]["a"] = c * jax.random.orthogonal(jax.random.key(2), 64, (2,)).reshape(a.shape)
    got = curve(factors, optax.sgd(rate / c**2), adapter.applied, base)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)


def test_dropout_drops_inputs_of_the_adapter_only(small, base, tokens):
    adapter = bound(small, rank=4, dropout=0.25)
    factors = random_adapter(adapter)
    draw = lambda *numbers: tuple(map(jnp.int32, numbers))
    loss = jax.jit(
        lambda factors, draw: loss_of(small.policy, tokens, adapter.applied(base, factors, draw))
    )
    exact = loss(factors, None)
    first = loss(factors, draw(0, 0, 0))
    assert first == loss(factors, draw(0, 0, 0))
    others = [loss(factors, draw(*n)) for n in ((1, 0, 0), (0, 1, 0), (0, 0, 1))]
    assert len({float(x) for x in (exact, first, *others)}) == 5
    # The teacher has no dropout, even if it reads the student's parameters.
    params = lora.without_dropout(adapter.applied(base, factors, draw(0, 0, 0)))
    assert loss_of(small.policy, tokens, params) == pytest.approx(float(exact), rel=1e-6)
    new = adapter.init(jax.random.key(0))
    np.testing.assert_array_equal(loss(new, draw(0, 0, 0)), loss(new, None))

    x = jnp.ones((1000, 16))
    dropped = lora.LowRank(x, x, x, jax.random.key(0), 0.25).dropped(x)
    assert {*np.unique(dropped)} == {0.0, np.float32(1 / 0.75)}
    assert float(dropped.mean()) == pytest.approx(1, abs=0.02)


def test_a_checkpointed_layer_draws_the_same_inputs_again(base, tokens):
    """The gradient of a layer that is computed twice equals that of one that is computed once."""
    model = lambda remat: decoder.from_config(
        tiny_config.decoder(num_layers=2, scan_unroll=1, remat=remat)
    )
    gradients = []
    for remat in ("none", "full"):
        adapter = bound(made := model(remat), rank=4, dropout=0.25)
        params = lambda f, adapter=adapter: adapter.applied(base, f, (jnp.int32(5),))
        loss = lambda f, made=made, params=params: loss_of(made.policy, tokens, params(f))
        gradients.append(jax.grad(loss)(random_adapter(adapter)))
    for x, y in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_a_base_in_8_bits_is_rounded_once(small, base, tokens):
    """The loss and its gradient are those of the rounded matrices in float32."""
    exact, rounded = (bound(small, rank=4, base=form) for form in ("exact", "int8"))
    held = jax.jit(rounded.held)(base)
    assert held["layers"]["q"].values.dtype == jnp.int8
    assert held["layers"]["o"].scale.shape == (2, 1, 1, 64)
    assert held["head"].dtype == jnp.float32
    new = rounded.init(jax.random.key(0))
    plain = rounded.merged(Weights(held, new))
    error = jnp.abs(plain["layers"]["q"] - base["layers"]["q"]) / held["layers"]["q"].scale
    assert 0.4 < float(error.max()) <= 0.5 + 1e-4
    factors = random_adapter(rounded)
    loss = functools.partial(loss_of, small.policy, tokens)
    got = jax.value_and_grad(lambda f: loss(rounded.applied(held, f)))(factors)
    expected = jax.value_and_grad(lambda f: loss(exact.applied(plain, f)))(factors)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=ROUNDING * float(jnp.abs(y).max()))
    summed = rounded.merged(Weights(held, factors))
    assert loss(summed) == pytest.approx(float(got[0]), rel=1e-5)

    mesh = mesh_lib.make_mesh((2, 2, 2))
    shapes = jax.eval_shape(small.init, jax.random.key(0))
    abstract = mesh_lib.abstract_of(shapes, mesh_lib.tree_shardings(mesh, small.rules, shapes))
    placed = rounded.abstract_base(abstract)
    q, o = placed["layers"]["q"], placed["layers"]["o"]
    assert (q.values.dtype, q.scale.dtype) == (jnp.int8, jnp.float32)
    assert q.values.sharding.spec == P(None, "fsdp", "tensor", None)
    assert q.scale.sharding.spec == P(None, None, "tensor", None)
    assert o.scale.sharding.spec == P(None, None, None, "fsdp")
    assert placed["embedding"].sharding.spec == P("tensor", "fsdp")


def test_factors_are_sharded_like_their_matrix(small):
    mesh = mesh_lib.make_mesh((2, 2, 2))
    shapes = jax.eval_shape(small.init, jax.random.key(0))
    abstract = mesh_lib.abstract_of(shapes, mesh_lib.tree_shardings(mesh, small.rules, shapes))
    found = bound(small, rank=4).abstract(abstract)
    spec = lambda name, factor: found[f"layers/{name}"][factor].sharding.spec
    assert spec("q", "a") == P(None, "fsdp", None)
    assert spec("q", "b") == P(None, "fsdp", "tensor", None)
    assert spec("o", "a") == P(None, "tensor", None, "fsdp")
    assert spec("o", "b") == spec("down", "b") == P(None, None, "fsdp")
    assert spec("down", "a") == P(None, "tensor", "fsdp")
    odd = bound(small, rank=3).abstract(abstract)  # two devices cannot split a rank of 3
    assert odd["layers/q"]["b"].sharding.spec == P(None, None, "tensor", None)


def own(**changes):
    """Returns a user's model, whose policy knows nothing of adapters."""
    config = ConfigDict({"vocab_size": 16, "hidden_size": 8})
    return tiny_model.make(config)._replace(**changes)


def test_a_model_of_ones_own_is_adapted_by_name():
    model = own()
    params = model.init(jax.random.key(0))
    adapter = bound(model, rank=2, alpha=2.0, targets=("out",))
    factors = random_adapter(adapter)
    assert {*factors} == {"out"}
    tokens = jax.random.randint(jax.random.key(0), (2, 6), 0, 16)
    joined = adapter.applied(params, factors)
    assert joined["table"] is params["table"]
    by_hand = params["out"] + factors["out"]["a"] @ factors["out"]["b"]
    np.testing.assert_allclose(joined["out"], by_hand, rtol=1e-6, atol=1e-6)
    gradient = jax.grad(lambda f: loss_of(model.policy, tokens, adapter.applied(params, f)))
    assert jax.tree.map(jnp.shape, gradient(factors)) == jax.tree.map(jnp.shape, factors)


def test_a_stack_of_matrices_has_one_adapter_each():
    def init(key):
        return {"stack": jax.random.normal(key, (3, 4, 2, 5))}

    model = own(init=init, matrices=((r"stack", Matrix(stacked=1, inputs=2)),))
    adapter = bound(model, rank=2)
    shapes = jax.tree.map(jnp.shape, adapter.init(jax.random.key(0)))
    assert shapes == {"stack": {"a": (3, 4, 2, 2), "b": (3, 2, 5)}}


REFUSED = {
    "a target that matches nothing": (
        {"targets": ("layers/q", "layers/qq")},
        r"config\.adapter\.targets: 'layers/qq' matches nothing; expected .*layers/down, layers/g",
    ),
    "a target that matches norms only": (
        {"targets": (r"layers/\w+_norm",)},
        r"'layers/\\\\w\+_norm' matches only layers/attention_norm, .* cannot be adapted",
    ),
    "a part of a path": ({"targets": ("q",)}, r"'q' matches nothing; expected .*whole path"),
    "a rank above a side": (
        {"rank": 33},
        r"config\.adapter\.rank is 33; expected at most 32, .*layers/k \[2 x 64",
    ),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=[*REFUSED])
def test_adapters_that_do_not_fit_the_model_are_refused(small, options, message):
    with pytest.raises(ConfigError, match=message):
        bound(small, **options)
    assert bound(small, rank=32)


def test_adapters_that_do_not_fit_a_model_of_ones_own_are_refused():
    with pytest.raises(ConfigError, match=r"targets is \(\); .*such as out, table, .*'a:make'"):
        bound(own(), rank=2)
    with pytest.raises(ConfigError, match=r"dropout is 0\.5; expected 0\.0, because .*low_rank"):
        bound(own(), rank=2, targets=("out",), dropout=0.5)
    with pytest.raises(ConfigError, match=r"base is 'int8'; expected 'exact', because .*low_rank"):
        bound(own(), rank=2, targets=("out",), base="int8")
    with pytest.raises(ConfigError, match=r"'bias' matches nothing"):
        bound(own(), rank=2, targets=("bias",))
