"""The losses inside other people's code: their meshes, parameters, closures and schedules."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from opsd_jax import losses

B, T, D, V = 8, 4, 6, 16
OUTCOMES = (np.arange(B) % 2 == 0, np.arange(B) % 2 == 1, np.zeros(B, bool))


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return {
        "w": draw(D, V),
        "teacher": draw(D, V),
        "hidden": draw(B, T, D),
        "tokens": jnp.asarray(rng.integers(V, size=(B, T))),
        "mask": jnp.asarray(rng.random((B, T)) < 0.8),
        "logprobs": -jnp.abs(draw(B, T)),
    }


def unembed(params, hidden):
    return hidden @ params


def distilled(data, w, *, partition=None, row_weight=1.0, **options):
    return losses.opsd(
        student=losses.Head(unembed, w, data["hidden"]),
        teacher=losses.Head(unembed, data["teacher"], data["hidden"]),
        mask=data["mask"],
        outcomes=OUTCOMES,
        tokens=data["tokens"],
        behaviour_logprobs=data["logprobs"],
        options=losses.OPSD(**options),
        partition=partition,
        row_weight=row_weight,
    ).mean


def reinforced(data, w, **options):
    return losses.policy_gradient(
        student=losses.Head(unembed, w, data["hidden"]),
        tokens=data["tokens"],
        mask=data["mask"],
        advantages=jnp.linspace(-1, 1, B),
        behaviour_logprobs=data["logprobs"],
        old_logprobs=data["logprobs"] - 0.1,
        reference_logprobs=data["logprobs"],
        options=losses.PolicyGradient(**options),
    ).mean


def trained(data, w, **changes):
    arguments = {"tokens": data["tokens"], "mask": data["mask"]}
    head = losses.Head(unembed, w, data["hidden"])
    return losses.sft(**{"student": head, **arguments, **changes}).mean


def assert_equal(got, expected):
    """Compares values and gradients, whose entries are sums of up to B T products in float32."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.fixture
def explicit():
    return jax.make_mesh((4, 2), ("data", "tensor"), (jax.sharding.AxisType.Explicit,) * 2)


@pytest.mark.parametrize("in_context", [False, True])
def test_a_head_on_explicit_axes_is_refused_by_name(data, explicit, in_context):
    w = jax.device_put(data["w"], NamedSharding(explicit, P(None, "tensor")))
    context = jax.set_mesh(explicit if in_context else jax.make_mesh((), ()))
    with context, pytest.raises(ValueError, match=r"has Explicit axes \['.*tensor'\]; expected"):
        trained(data, w)


def test_replicated_arrays_on_an_explicit_mesh_are_used(data, explicit):
    w = jax.device_put(data["w"], NamedSharding(explicit, P()))
    expected = jax.value_and_grad(lambda w: trained(data, w))(data["w"])
    assert_equal(jax.jit(jax.value_and_grad(lambda w: trained(data, w)))(w), expected)


@pytest.mark.parametrize("split", [P(), P(None, "tensor")])
def test_auto_axes_around_the_loss_are_as_documented(data, explicit, split):
    expected = jax.value_and_grad(lambda w: distilled(data, w))(data["w"])
    placed = {
        name: jax.device_put(x, NamedSharding(explicit, split if x.shape == (D, V) else P("data")))
        for name, x in data.items()
    }
    loss = jax.sharding.auto_axes(lambda w, data: distilled(data, w), out_sharding=P())
    with jax.set_mesh(explicit):
        for run in (jax.value_and_grad(loss), jax.jit(jax.value_and_grad(loss))):
            value, gradient = run(placed["w"], placed)
            assert_equal((value, gradient), expected)
            assert gradient.sharding.spec == P(*split, *[None] * (2 - len(split)))


def test_a_partition_works_outside_jit(data):
    expected = jax.value_and_grad(lambda w: distilled(data, w))(data["w"])
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), (jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        got = jax.value_and_grad(lambda w: distilled(data, w, partition=P("data")))(data["w"])
    assert_equal(got, expected)


FORMS = {
    "eager": jax.value_and_grad,
    "jit": lambda f: jax.jit(jax.value_and_grad(f)),
    "inner jit": lambda f: jax.value_and_grad(jax.jit(f)),
    "checkpoint": lambda f: jax.jit(jax.value_and_grad(jax.checkpoint(f))),
    "scan": lambda f: jax.jit(
        jax.value_and_grad(
            lambda w, *rest: jax.lax.scan(lambda c, _: (c + f(w, *rest), None), 0.0, length=1)[0]
        )
    ),
}


@pytest.mark.parametrize("form", [*FORMS])
@pytest.mark.parametrize("partition", [None, P("data")])
def test_an_unembed_may_close_over_the_model(data, form, partition):
    """The student's gradient is the same as through `params`; the teacher's is 0."""
    over = lambda w: losses.Head(lambda scale, hidden: hidden @ w * scale, 0.5, data["hidden"])
    given = lambda w: losses.Head(lambda w, hidden: hidden @ w * 0.5, w, data["hidden"])
    common = {"mask": data["mask"], "outcomes": OUTCOMES, "partition": partition}
    close = lambda w: losses.opsd(student=over(w), teacher=over(w + 1.0), **common).mean
    fixed = lambda w: jax.lax.stop_gradient(w + 1.0)
    plain = lambda w: losses.opsd(student=given(w), teacher=given(fixed(w)), **common).mean
    with jax.set_mesh(jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))):
        expected = jax.jit(jax.value_and_grad(plain))(data["w"])
        assert_equal(FORMS[form](close)(data["w"]), expected)


def test_a_teacher_that_closes_over_the_model_has_no_gradient_beside_logits(data):
    teacher = lambda w: losses.Head(lambda _, hidden: hidden @ w * 1.5, {}, data["hidden"])
    loss = lambda w, other: (
        losses.opsd(
            student=data["hidden"] @ w, teacher=teacher(other), mask=data["mask"], outcomes=OUTCOMES
        ).mean
    )
    expected = jax.grad(loss)(data["w"], data["w"])
    assert_equal(jax.grad(lambda w: loss(w, w))(data["w"]), expected)


def test_an_unembed_may_close_over_other_arrays(data):
    def loss(w, scale):
        student = losses.Head(lambda w, hidden: hidden @ w * scale, w, data["hidden"])
        return trained(data, w, student=student)

    expected = jax.value_and_grad(lambda w: trained(data, w * 2))(data["w"])
    for form in FORMS.values():
        assert_equal(form(loss)(data["w"], 2.0), expected)
    mapped = jax.vmap(loss, (None, 0))(data["w"], jnp.array([2.0, 2.0]))
    assert_equal(mapped[1], expected[0])


def test_params_may_have_leaves_that_are_functions(data):
    """As the modules of Equinox have."""

    def loss(w):
        params = {"activation": jnp.tanh, "w": w, "unused": [w, jax.nn.relu, "name", jnp.float32]}
        params |= {"inference": True, "size": V}

        def apply(params, hidden):
            logits = hidden @ params["w"] if params["inference"] else hidden
            return params["activation"](logits).reshape(-1, params["size"])

        head = losses.Head(apply, params, data["hidden"])
        return losses.opsd(
            student=head,
            teacher=losses.Head(apply, params | {"w": data["teacher"]}, data["hidden"]),
            mask=data["mask"],
            outcomes=OUTCOMES,
        ).mean

    logits = lambda w: jnp.tanh(data["hidden"] @ w)
    expected = lambda w: (
        losses.opsd(
            student=logits(w), teacher=logits(data["teacher"]), mask=data["mask"], outcomes=OUTCOMES
        ).mean
    )
    assert_equal(jax.value_and_grad(loss)(data["w"]), jax.value_and_grad(expected)(data["w"]))


@pytest.mark.parametrize(
    ("loss", "option", "others"),
    [
        (distilled, "beta", {"divergence": "jsd"}),
        (distilled, "alpha", {"divergence": "skewed_kl"}),
        (distilled, "clip", {}),
        (distilled, "importance_cap", {}),
        (distilled, "floor", {"position": "sigmoid"}),
        (distilled, "length", {"aggregation": "fixed"}),
        (reinforced, "kl_coefficient", {}),
        (reinforced, "clip_low", {}),
        (reinforced, "clip_high", {}),
        (reinforced, "importance_cap", {}),
        (reinforced, "dual_clip", {}),
    ],
)
def test_a_traced_number_is_an_option(data, loss, option, others):
    """A schedule traces it, or returns an array outside jit."""
    value = 1.3 if option == "dual_clip" else 0.3
    f = lambda w, value: loss(data, w, **others, **{option: value})
    expected = FORMS["jit"](lambda w: f(w, value))(data["w"])
    assert_equal(FORMS["checkpoint"](f)(data["w"], value), expected)
    constant = jnp.float32(value)
    assert_equal(FORMS["jit"](lambda w: f(w, constant))(data["w"]), expected)


def test_a_traced_option_with_a_partition_or_with_logits(data):
    both = {"student": data["hidden"] @ data["w"], "teacher": data["hidden"] @ data["teacher"]}
    of_logits = lambda logits, beta: (
        losses.opsd(
            **both | {"student": logits},
            mask=data["mask"],
            outcomes=OUTCOMES,
            options=losses.OPSD(divergence="jsd", beta=beta),
        ).mean
    )
    split = lambda w, beta: distilled(data, w, divergence="jsd", beta=beta, partition=P("data"))
    with jax.set_mesh(jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))):
        for f, x in ((of_logits, both["student"]), (split, data["w"])):
            expected = jax.jit(jax.value_and_grad(lambda x, f=f: f(x, 0.3)))(x)
            for form in FORMS.values():
                assert_equal(form(f)(x, 0.3), expected)


@pytest.mark.parametrize("option", ["top_k", "skip_first", "first_only", "control_variate"])
def test_a_traced_option_that_decides_on_the_program_is_named(data, option):
    with pytest.raises(ValueError, match=f"{option} is traced .*; expected a Python"):
        jax.jit(lambda value: distilled(data, data["w"], **{option: value}))(1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"student": (0, None)},
            r"student is a tuple; expected an array: logits .* pass only its first element",
        ),
        ({"student": np.zeros((B, T, V), int)}, "student has dtype int64; expected floating point"),
        ({"tokens": None}, r"tokens is None; expected an array \[rows, tokens\]"),
        ({"mask": None}, r"mask is None; expected an array \[rows, tokens\]"),
        ({"tokens": np.zeros((B, T))}, "tokens has dtype float.*; expected integers"),
        (
            {"student": lambda w, hidden: (hidden @ w, None)},
            r"student.unembed, for hidden states of shape \[1, 6\], returns a tuple; expected only",
        ),
        (
            {"student": lambda w, hidden: jnp.einsum("btd,dv->btv", hidden, w)},
            r"raises ValueError \(.*\); expected .* function\(params, hidden\[None\]\)\[0\]",
        ),
    ],
)
def test_wrong_arguments_are_named(data, changes, message):
    if callable(changes.get("student")):
        changes = {"student": losses.Head(changes["student"], data["w"], data["hidden"])}
    with pytest.raises(ValueError, match=message):
        trained(data, data["w"], **changes)


def test_wrong_options_and_missing_log_probabilities_are_named(data):
    arguments = {"student": data["hidden"], "tokens": data["tokens"], "mask": data["mask"]}
    policy = arguments | {"advantages": jnp.ones(B), "behaviour_logprobs": data["logprobs"]}
    distillation = {"teacher": data["hidden"], "outcomes": OUTCOMES}
    for options in ({"beta": 1}, losses.PolicyGradient()):
        with pytest.raises(ValueError, match=r"options is .*; expected an OPSD, such as"):
            losses.opsd(**arguments, **distillation, options=options)
    with pytest.raises(ValueError, match="options is 'grpo'; expected a PolicyGradient"):
        losses.policy_gradient(**policy, options="grpo")
    for name in ("policy", "distillation"):
        with pytest.raises(ValueError, match=f"{name} is 1; expected an? "):
            losses.joint(**policy, **distillation, **{name: 1})
    for name in ("behaviour_logprobs", "advantages"):
        with pytest.raises(ValueError, match=f"{name} is None; expected an array"):
            losses.policy_gradient(**policy | {name: None})
    for outcomes, name in ((None, "outcomes"), ((*OUTCOMES[:2], None), "truncated")):
        with pytest.raises(ValueError, match=f"{name} is None; expected an array"):
            losses.opsd(**arguments, **distillation | {"outcomes": outcomes})
    tokens = np.asarray(data["tokens"], np.uint8)
    assert_equal(trained(data, data["w"], tokens=tokens), trained(data, data["w"]))


@pytest.mark.parametrize("divergence", [*losses.DIVERGENCES])
def test_strict_promotion_of_opsd(data, divergence):
    options = {"divergence": divergence, "importance_cap": 2.0, "clip": 0.1, "skip_first": 1}
    f = jax.value_and_grad(lambda w: distilled(data, w, position="sigmoid", **options))
    with jax.numpy_dtype_promotion("strict"):
        got = f(data["w"])
    assert_equal(got, f(data["w"]))


@pytest.mark.parametrize("preset", [*losses.PRESETS])
def test_strict_promotion_of_the_policy_gradient(data, preset):
    options = losses.PRESETS[preset]._asdict() | {"length": 4.0}
    f = jax.value_and_grad(lambda w: reinforced(data, w, **options))
    rewards = jnp.arange(B) % 3 / 2
    with jax.numpy_dtype_promotion("strict"):
        got = f(data["w"])
        losses.overlong_penalty(jnp.arange(B), max_tokens=6, buffer=3)
        distilled(data, data["w"], row_weight=losses.informative(rewards, 4))
        losses.PRESETS[preset].advantages(rewards, 4)
    assert_equal(got, f(data["w"]))


def test_strict_promotion_of_the_joint_loss(data):
    f = lambda: (
        losses.joint(
            student=losses.Head(unembed, data["w"], data["hidden"]),
            teacher=losses.Head(unembed, data["teacher"], data["hidden"]),
            tokens=data["tokens"],
            mask=data["mask"],
            advantages=jnp.linspace(-1, 1, B),
            behaviour_logprobs=data["logprobs"],
            outcomes=OUTCOMES,
            distillation=losses.OPSD(top_k=3, support="union"),
            policy_weight=0.5,
        )[0].mean
    )
    with jax.numpy_dtype_promotion("strict"):
        got = f()
    assert_equal(got, f())


def test_the_losses_import_only_jax_and_numpy():
    """And what these import: nothing else that the package depends on."""
    program = """
import sys, time
import jax, jax.numpy, jax.experimental.checkify
from jax.interpreters import partial_eval
before, began = {*sys.modules}, time.perf_counter()
import opsd_jax.losses
print(time.perf_counter() - began)
print(sorted({name.partition(".")[0] for name in {*sys.modules} - before}))
"""
    times = []
    for _ in range(3):  # other processes may disturb one of them
        run = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        )
        seconds, names = run.stdout.splitlines()
        assert set(eval(names)) <= {"opsd_jax", *sys.stdlib_module_names}
        times.append(float(seconds))
    assert min(times) < 0.1
