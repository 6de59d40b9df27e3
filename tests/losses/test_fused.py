"""Losses from hidden states: for any head and mesh, and without an array [tokens, vocabulary]."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_losses import assert_near

from opsd_jax import losses
from opsd_jax.parallel import mesh as mesh_lib

B, T, D, V = 8, 6, 5, 12


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(0, 1, shape), jnp.float32)
    params = lambda: {
        "kernel": normal(D, V),
        "embedding": normal(V, D),
        "bias": normal(V),
        "int8": jnp.asarray(rng.integers(-9, 9, (D, V)), jnp.int8),
        "layers": normal(3, D, D),  # no head reads it
    }
    return {
        "params": params(),
        "teacher_params": params(),
        "hidden": normal(B, T, D),
        "teacher_hidden": normal(B, T, D),
        "mask": np.arange(T) < np.array([6, 1, 3, 0, 4, 5, 2, 6])[:, None],
        "outcomes": tuple(np.arange(B) % 3 == i for i in range(3)),
        "tokens": rng.integers(0, V - 2, (B, T)),  # one of the heads has two entries of padding
        "behaviour_logprobs": -rng.uniform(1, 4, (B, T)).astype(np.float32),
        "advantages": rng.normal(size=B).astype(np.float32),
    }


def dot(hidden, kernel):
    return jnp.einsum("...d,dv->...v", hidden, kernel, preferred_element_type=jnp.float32)


def bias(params, hidden):
    return params["bias"].reshape((1,) * (hidden.ndim - 1) + (V,))


HEADS = {
    "plain": lambda p, h: dot(h, p["kernel"]),
    "tied": lambda p, h: dot(h, p["embedding"].T),
    "biased": lambda p, h: dot(h, p["kernel"]) + bias(p, h),
    "soft-capped and scaled": lambda p, h: 3 * jnp.tanh(dot(h, p["kernel"]) * 0.8 / 3),
    "two of them": lambda p, h: dot(h, p["kernel"] + p["embedding"].T) + bias(p, h),
    "quantised": lambda p, h: dot(h, p["int8"].astype(h.dtype)) / 5 + bias(p, h),
    "cosine": lambda p, h: dot(h / jnp.sqrt((h * h).sum(-1, keepdims=True)), p["kernel"]),
    "padded": lambda p, h: dot(h, p["kernel"]).at[..., V - 2 :].set(-jnp.inf),
    "jitted": jax.jit(lambda p, h: dot(h, p["kernel"])),
}
JOINT = {
    "policy": losses.PolicyGradient(ratio="sequence"),
    "distillation": losses.OPSD(gate=(1.0, 0.5, 0.25), divergence="jsd", importance_cap=2.0),
}


def joint(data, fused, unembed=HEADS["plain"], params=None, hidden=None, **arguments):
    """Computes the joint objective, from logits or from heads."""
    params = data["params"] if params is None else params
    hidden = data["hidden"] if hidden is None else hidden
    student = losses.Head(unembed, params, hidden)
    teacher = losses.Head(unembed, data["teacher_params"], data["teacher_hidden"])
    if not fused:
        student, teacher = (x.unembed(x.params, x.hidden) for x in (student, teacher))
    names = ("mask", "outcomes", "tokens", "behaviour_logprobs", "advantages")
    given = {name: data[name] for name in names} | JOINT | arguments
    return losses.joint(student=student, teacher=teacher, **given)


def value_and_grad(data, fused, **arguments):
    def loss(trained, hidden):
        params = {name: trained.get(name, x) for name, x in data["params"].items()}
        total, policy, opsd = joint(data, fused, params=params, hidden=hidden, **arguments)
        return total.sum, (total.weight, policy.sum, opsd.sum, policy.tokens, opsd.tokens)

    trained = {name: x for name, x in data["params"].items() if name != "int8"}
    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(trained, data["hidden"])


def assert_tree_near(got, expected, relative=1e-5):
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True
    ):
        try:
            assert_near(x, y, relative)
        except AssertionError as error:
            raise AssertionError(jax.tree_util.keystr(path)) from error


@pytest.mark.parametrize("chunk", [1, 7, 128, None])
@pytest.mark.parametrize("unembed", HEADS.values(), ids=HEADS)
def test_heads_of_every_kind_agree_with_logits(data, unembed, chunk):
    expected = value_and_grad(data, False, unembed=unembed)
    got = value_and_grad(data, True, unembed=unembed, chunk=chunk)
    assert_tree_near(got, expected)
    np.testing.assert_array_equal(got[1][0]["layers"], 0)


@pytest.mark.parametrize(
    "mesh",
    [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4), (1, 1, 1)],
    ids=lambda shape: "x".join(map(str, shape)),
)
@pytest.mark.parametrize("tied", [False, True], ids=["kernel", "tied"])
def test_a_mesh_does_not_change_the_loss(data, mesh, tied):
    """Rows are split over data and fsdp, and the vocabulary of the head over tensor."""
    unembed = HEADS["tied" if tied else "biased"]
    expected = value_and_grad(data, False, unembed=unembed)
    devices = jax.devices()[: int(np.prod(mesh))]
    mesh = mesh_lib.make_mesh(mesh, devices)
    specs = {"kernel": P(None, "tensor"), "embedding": P("tensor"), "bias": P("tensor")}
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    sharded = dict(data)
    for name in ("params", "teacher_params"):
        sharded[name] = {k: put(x, specs.get(k, P())) for k, x in data[name].items()}
    for name in ("hidden", "teacher_hidden"):
        sharded[name] = put(data[name], P(mesh_lib.ROWS))
    with jax.set_mesh(mesh):
        run = jax.jit(
            lambda data: value_and_grad(
                data, True, unembed=unembed, chunk=3, partition=mesh_lib.rows_in_context()
            )
        )
        assert_tree_near(run(sharded), expected)


def test_tokens_can_be_split_over_a_mesh_axis(data):
    expected = value_and_grad(data, False)
    mesh = mesh_lib.make_mesh((2, 2, 1), jax.devices()[:4])
    narrow = {k: x[:, :4] if getattr(x, "shape", ())[:2] == (B, T) else x for k, x in data.items()}
    expected = value_and_grad(narrow, False)
    with jax.set_mesh(mesh):
        run = jax.jit(lambda d: value_and_grad(d, True, chunk=3, partition=P("data", "fsdp")))
        assert_tree_near(run(narrow), expected)


def inner_jaxprs(jaxpr):
    """Yields a jaxpr and all jaxprs inside its equations."""
    yield jaxpr
    for eqn in jaxpr.eqns:
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(value, "eqns"):
                yield from inner_jaxprs(value)
            elif hasattr(value, "jaxpr"):
                yield from inner_jaxprs(value.jaxpr)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "logits"])
def test_no_array_of_tokens_by_vocabulary_and_no_repeated_matmul(fused):
    """Reads sizes of arrays and the number of matmuls from the jaxpr of a loss and its gradient."""
    tokens, vocab, chunk = 64, 96, 16
    shapes = jnp.zeros((1, tokens, D)), jnp.zeros((D, vocab))

    def loss(hidden, kernel):
        head = losses.Head(lambda w, h: dot(h, w), kernel, hidden)
        return losses.opsd(
            student=head if fused else dot(hidden, kernel),
            teacher=losses.Head(lambda w, h: dot(h, w), kernel + 1, hidden),
            mask=jnp.ones((1, tokens), bool),
            outcomes=(jnp.ones(1, bool), jnp.zeros(1, bool), jnp.zeros(1, bool)),
            chunk=chunk,
        ).sum

    program = jax.make_jaxpr(jax.grad(loss, (0, 1)))(*shapes).jaxpr
    sizes, matmuls = [], 0
    for jaxpr in inner_jaxprs(program):
        for eqn in jaxpr.eqns:
            sizes += [var.aval.size for var in eqn.outvars]
            matmuls += eqn.primitive.name == "dot_general"
    assert (max(sizes) < tokens * vocab) == fused
    assert max(sizes) >= chunk * vocab
    # The logits of the student and of the teacher, and the two gradients of the student.
    assert matmuls == 4


def test_memory_does_not_grow_with_the_tokens():
    """Compares the temporary memory of the compiled loss at 256 and at 1,024 tokens."""
    vocab = 4096

    def temporaries(tokens):
        def loss(hidden, kernel, mask):
            head = losses.Head(lambda w, h: dot(h, w), kernel, hidden)
            return losses.sft(
                student=head, tokens=jnp.zeros((1, tokens), int), mask=mask, chunk=32
            ).sum

        f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
        mask = jax.ShapeDtypeStruct((1, tokens), bool)
        compiled = (
            jax.jit(jax.grad(loss, (0, 1))).lower(f32(1, tokens, D), f32(D, vocab), mask).compile()
        )
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = temporaries(256), temporaries(1024)
    assert few < 256 * vocab * 4  # one array [tokens, vocabulary]
    assert many - few < 0.1 * (1024 - 256) * vocab * 4


def test_tokens_without_weight_have_no_effect(data):
    """NaN and infinity in hidden states and inputs change no value, gradient or diagnostic."""
    masked = ~data["mask"]
    spoilt = dict(data)
    for name in ("hidden", "teacher_hidden"):
        spoilt[name] = jnp.where(masked[..., None], jnp.nan, data[name])
    spoilt["behaviour_logprobs"] = np.where(masked, np.inf, data["behaviour_logprobs"])
    spoilt["tokens"] = np.where(masked, -100, data["tokens"])
    expected = value_and_grad(data, True, chunk=5)
    got = value_and_grad(spoilt, True, chunk=5)
    assert_tree_near(got, expected)
    np.testing.assert_array_equal(got[1][1][masked], 0)

    logits = [dot(spoilt[f"{x}hidden"], data[f"{x}params"]["kernel"]) for x in ("", "teacher_")]
    loss = lambda student: logits_loss(spoilt, student=student, teacher=logits[1]).sum
    value, gradient = jax.value_and_grad(loss)(logits[0])
    assert np.isfinite(value)
    np.testing.assert_array_equal(gradient[masked], 0)
    assert np.isfinite(gradient).all()


def test_padding_on_either_side_has_no_effect(data):
    """Compares with each row alone without padding, and with more padding on either side."""
    expected, (_, of_hidden) = value_and_grad(data, True)
    by_token = [k for k, x in data.items() if np.shape(x)[:2] == (B, T)]
    total = 0.0
    for b in np.flatnonzero(data["mask"].any(axis=1)):
        n = int(data["mask"][b].sum())
        row = {k: data[k][b : b + 1, :n] for k in by_token}
        row |= {"advantages": data["advantages"][b : b + 1]}
        row |= {"outcomes": tuple(x[b : b + 1] for x in data["outcomes"])}
        total += float(jax.jit(lambda row: joint(data | row, True)[0].sum)(row))
    assert_near(total, expected[0])
    for left, right in ((3, 0), (2, 5)):
        sides = lambda x, pad=(left, right): [(0, 0), pad] + [(0, 0)] * (np.ndim(x) - 2)
        padded = data | {k: jnp.pad(data[k], sides(data[k])) for k in by_token}
        for fused in (True, False):
            got, (_, gradient) = value_and_grad(padded, fused, chunk=4)
            assert_near(got[0], expected[0])
            assert_near(gradient[:, left : left + T], of_hidden)


def test_a_batch_without_active_rows_has_a_loss_and_gradients_of_0(data):
    nothing = tuple(np.zeros(B, bool) for _ in range(3))

    def loss(params):
        out = losses.opsd(
            student=losses.Head(HEADS["plain"], params, data["hidden"]),
            teacher=losses.Head(HEADS["plain"], data["teacher_params"], data["teacher_hidden"]),
            mask=data["mask"],
            outcomes=nothing,
        )
        return out.mean, out

    trained = {"kernel": data["params"]["kernel"]}
    (mean, out), gradient = jax.value_and_grad(loss, has_aux=True)(trained)
    assert (float(mean), float(out.sum), float(out.weight)) == (0, 0, 0)
    np.testing.assert_array_equal(gradient["kernel"], 0)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "logits"])
def test_only_the_student_gets_gradients(data, fused):
    def loss(others):
        return joint(data | others, fused)[0].sum

    others = {
        name: jnp.asarray(data[name])
        for name in ("teacher_hidden", "behaviour_logprobs", "advantages")
    } | {"teacher_params": {k: x for k, x in data["teacher_params"].items() if k != "int8"}}
    for leaf in jax.tree.leaves(jax.grad(loss)(others)):
        np.testing.assert_array_equal(leaf, 0)


def test_token_values_can_be_differentiated_for_any_cotangent(data):
    """The objective is a sum of squares, which is not a weighted sum of the values."""

    def objective(params, hidden, fused):
        student = losses.Head(HEADS["biased"], params, hidden)
        if not fused:
            student = student.unembed(params, hidden)
        values = losses.response_logprobs(
            student=student, tokens=data["tokens"], mask=data["mask"], chunk=4
        )
        return jnp.sum(values**2), values

    params = {name: data["params"][name] for name in ("kernel", "bias")}
    run = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
    assert_tree_near(run(params, data["hidden"], True), run(params, data["hidden"], False))


def test_a_loss_that_is_not_differentiated_computes_no_gradient(data):
    """The values are the same, and the jaxpr has no matmuls for gradients."""
    loss = lambda hidden: joint(data, True, hidden=hidden, policy=losses.PolicyGradient())[0].sum
    count = lambda f: sum(
        eqn.primitive.name == "dot_general"
        for jaxpr in inner_jaxprs(jax.make_jaxpr(f)(data["hidden"]).jaxpr)
        for eqn in jaxpr.eqns
    )
    assert (count(loss), count(jax.grad(loss))) == (2, 4)
    np.testing.assert_array_equal(loss(data["hidden"]), jax.value_and_grad(loss)(data["hidden"])[0])


@pytest.mark.parametrize("options", [losses.OPSD(), losses.OPSD(divergence="jsd", top_k=4)])
def test_bfloat16(options):
    """Hidden states and head are bfloat16; logits and everything after them are float32."""
    rng = np.random.default_rng(0)
    low = lambda *shape: jnp.asarray(rng.normal(0, 1, shape), jnp.bfloat16)
    student, teacher = ((low(D, V), low(4, T, D)) for _ in range(2))

    def loss(kernel, hidden, dtype):
        heads = [
            losses.Head(lambda w, h: dot(h, w), w.astype(dtype), h.astype(dtype))
            for w, h in ((kernel, hidden), teacher)
        ]
        return losses.opsd(
            student=heads[0],
            teacher=heads[1],
            mask=np.ones((4, T), bool),
            outcomes=(np.ones(4, bool), np.zeros(4, bool), np.zeros(4, bool)),
            options=options,
            chunk=5,
        ).mean

    run = jax.value_and_grad(loss, argnums=(0, 1))
    value, gradients = run(*student, jnp.bfloat16)
    exact, exact_gradients = run(*(x.astype(jnp.float32) for x in student), jnp.float32)
    assert_near(value, exact)  # the inputs are the same numbers, and all sums are float32
    # Each chunk's gradient of the head is rounded to bfloat16 once, and the result once: 2^-8 each.
    for got, expected in zip(gradients, exact_gradients, strict=True):
        assert got.dtype == jnp.bfloat16
        assert_near(got, expected, 3 * 2**-8)


# Invalid arguments.


def logits_loss(data, **changes):
    arguments = {
        "student": dot(data["hidden"], data["params"]["kernel"]),
        "teacher": losses.Head(HEADS["plain"], data["teacher_params"], data["teacher_hidden"]),
    }
    names = ("mask", "outcomes", "tokens", "behaviour_logprobs")
    arguments |= {name: data[name] for name in names}
    return losses.opsd(**arguments | changes)


BAD = {
    "top_k of sampled tokens": (
        {"options": losses.OPSD(divergence="jsd,sampled_kl,jsd", top_k=3)},
        "top_k is 3 with divergence 'jsd,sampled_kl,jsd'.*expected top_k = 0",
    ),
    "ranks": ({"mask": np.ones(T, bool)}, r"mask has dtype bool and shape \[6\]; expected dtype"),
    "numbers as mask": (
        {"mask": np.ones((B, T))},
        r"mask has dtype float32 and shape \[8, 6\]; expected",
    ),
    "two outcomes": (
        {"outcomes": (np.ones(B, bool),) * 2},
        r"outcomes has 2 masks; expected 3 \(correct",
    ),
    "no teacher": ({"teacher": None}, "teacher is None; expected logits or a Head"),
    "chunk": (
        {"student": losses.Head(lambda p, h: dot(h, p), np.ones((D, V)), np.ones((B, T, D)))}
        | {"chunk": -1},
        "chunk is -1; expected an int, in tokens",
    ),
    "no window": (
        {"options": losses.OPSD(skip_first=3, first_only=3)},
        "first_only is 3 and skip_first is 3, which leaves no tokens; expected",
    ),
    "gate's name": ({"options": losses.OPSD(gate="all")}, "gate is 'all'; expected weights"),
    "flat logits": (
        {"student": np.zeros((B * T, V))},
        r"student has shape \[48, 12\]; expected logits \[rows, tokens, V\], or a Head",
    ),
    "lengths": (
        {"student": np.zeros((B, T + 1, V))},
        r"student has shape \[8, 7, 12\]; expected \[8, 6\] as its first two axes",
    ),
    "teacher's length": (
        {"teacher": losses.Head(HEADS["plain"], {"kernel": np.zeros((D, V))}, np.zeros((B, 9, D)))},
        r"teacher.hidden has shape \[8, 9, 5\]; expected \[8, 6\] as its first two axes",
    ),
    "vocabularies": (
        {"teacher": np.zeros((B, T, V + 4))},
        "student has a vocabulary of 12 entries, and teacher has 16; expected the same number",
    ),
    "tokens": (
        {"tokens": np.zeros((B, T + 1), int)},
        r"tokens has shape \[8, 7\]; expected \[8, 6\]",
    ),
    "outcomes": (
        {"outcomes": (np.ones(B, bool), np.ones(B + 1, bool), np.ones(B, bool))},
        r"incorrect has shape \[9\]; expected \[8\]",
    ),
    "row weight": ({"row_weight": np.ones(3)}, r"row_weight has shape \[3\]; expected \[8\]"),
    "divergence": (
        {"options": losses.OPSD(divergence="kl")},
        "divergence is 'kl'; expected one of reverse_kl, forward_kl, jsd",
    ),
    "two divergences": (
        {"options": losses.OPSD(divergence="jsd,jsd")},
        "divergence is 'jsd,jsd'; expected one of reverse_kl, .*, or 3 of them separated by commas",
    ),
    "beta": ({"options": losses.OPSD(beta=1.5)}, r"beta is 1.5; expected a number in \[0, 1\]"),
    "alpha": ({"options": losses.OPSD(alpha=0.0)}, "alpha is 0.0"),
    "gate": ({"options": losses.OPSD(gate=(1.0, -1.0, 0.0))}, "gate is -1.0; expected"),
    "support": ({"options": losses.OPSD(support="both")}, "support is 'both'; expected one of"),
    "rest": ({"options": losses.OPSD(rest="tail")}, "rest is 'tail'; expected one of"),
    "position": ({"options": losses.OPSD(position="late")}, "position is 'late'; expected one of"),
    "aggregation": ({"options": losses.OPSD(aggregation="mean")}, "aggregation is 'mean'"),
    "temperature": ({"temperature": 0}, "temperature is 0; expected a number above 0"),
    "behaviour": (
        {"behaviour_logprobs": None, "options": losses.OPSD(importance_cap=2.0)},
        "behaviour_logprobs is None; expected",
    ),
    "no tokens": (
        {"tokens": None, "options": losses.OPSD(divergence="sampled_kl")},
        "tokens is None; expected",
    ),
    "unembed": (
        {"teacher": losses.Head(lambda p, h: dot(h, p)[0], np.zeros((D, V)), np.zeros((B, T, D)))},
        r"unembed maps hidden states of shape \[1, 5\] to shape \[12\]; expected logits of shape",
    ),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_named_before_anything_runs(data, changes, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: logits_loss(data, **changes).sum)


BAD_POLICY = {
    "reference": (
        {"options": losses.PRESETS["grpo"]},
        "reference_logprobs is None with kl_coefficient 0.04; expected",
    ),
    "advantages": ({"advantages": np.ones(3)}, r"advantages has shape \[3\]; expected \[8\]"),
    "behaviour": (
        {"behaviour_logprobs": np.ones((B, 1))},
        r"behaviour_logprobs has shape \[8, 1\]",
    ),
    "options": ({"options": "grpo"}, "options is 'grpo'; expected a PolicyGradient"),
    "length": ({"options": losses.PRESETS["dr_grpo"]}, "length is 0.0; expected a number that is"),
    "dual clip of cispo": (
        {"options": losses.PolicyGradient(clip="cispo", dual_clip=3.0)},
        "dual_clip is 3.0 with clip 'cispo'; expected dual_clip 0",
    ),
    "ratio": ({"options": losses.PolicyGradient(ratio="row")}, "ratio is 'row'; expected one of"),
    "clip": ({"options": losses.PolicyGradient(clip="min")}, "clip is 'min'; expected one of"),
    "clip_low": ({"options": losses.PolicyGradient(clip_low=-0.1)}, "clip_low is -0.1"),
    "dual_clip": ({"options": losses.PolicyGradient(dual_clip=0.5)}, "dual_clip is 0.5"),
    "axis": (
        {"partition": P("rows")},
        r"names the axis 'rows'; expected a mesh with this axis",
    ),
}


@pytest.mark.parametrize(("changes", "message"), BAD_POLICY.values(), ids=BAD_POLICY)
def test_bad_arguments_of_the_policy_gradient(data, changes, message):
    arguments = {
        "student": losses.Head(HEADS["plain"], data["params"], data["hidden"]),
        "options": losses.PolicyGradient(),
    }
    names = ("mask", "tokens", "behaviour_logprobs", "advantages")
    arguments |= {name: data[name] for name in names}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: losses.policy_gradient(**arguments | changes).sum)


def test_a_mesh_that_cannot_be_used(data):
    """Explicit axes and a surrounding shard_map that checks replication raise."""
    head = losses.Head(HEADS["plain"], data["params"], data["hidden"])
    arguments = {"tokens": data["tokens"], "mask": data["mask"]}
    explicit = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(explicit), pytest.raises(ValueError, match="has Explicit axes \\['data'\\]"):
        losses.sft(student=head, **arguments, partition=P("data"))
    mesh = mesh_lib.make_mesh((8, 1, 1))

    def each(hidden, tokens, mask):
        student = losses.Head(HEADS["plain"], data["params"], hidden)
        loss = losses.sft(student=student, tokens=tokens, mask=mask, chunk=3)
        return jax.lax.psum(loss.sum, "data")

    def names_the_same_axis(hidden, tokens, mask):
        student = losses.Head(HEADS["plain"], data["params"], hidden)
        loss = losses.sft(student=student, tokens=tokens, mask=mask, partition=P("data"))
        return loss.sum

    def mapped(check, each=each):
        return jax.shard_map(
            each,
            mesh=mesh,
            in_specs=P("data"),
            out_specs=P(),
            check_vma=check,
        )(data["hidden"], jnp.asarray(data["tokens"]), jnp.asarray(data["mask"]))

    with pytest.raises(
        ValueError, match="student is a Head inside a shard_map with check_vma=True"
    ):
        mapped(True)
    with (
        jax.set_mesh(mesh),
        pytest.raises(ValueError, match="'data', over which a surrounding"),
    ):
        mapped(False, names_the_same_axis)
    assert_near(mapped(False), losses.sft(student=head, **arguments).sum)


def test_no_rows_at_all(data):
    none = jnp.zeros((0, T, D))
    loss = losses.sft(
        student=losses.Head(HEADS["plain"], data["params"], none),
        tokens=np.zeros((0, T), int),
        mask=np.zeros((0, T), bool),
    )
    assert (float(loss.sum), float(loss.weight)) == (0, 0)


def test_the_weights_of_the_joint_objective_can_be_traced(data):
    """The two parts also have separate row weights."""
    loss = jax.jit(lambda w: [x.sum for x in joint(data, True, distillation_weight=w)])
    (half, policy, opsd), (none, *_) = loss(0.5), loss(0.0)
    assert_near(half - none, 0.5 * opsd)
    total, policy, _ = joint(data, True, row_weight=np.zeros(B))
    assert float(policy.sum) == 0
    assert_near(total.sum, opsd)
    assert float(total.weight) == 7


def test_other_bad_arguments(data):
    mesh = mesh_lib.make_mesh((8, 1, 1))
    head = losses.Head(HEADS["plain"], data["params"], data["hidden"][:6])
    arguments = {"student": head, "tokens": data["tokens"][:6], "mask": data["mask"][:6]}
    with (
        jax.set_mesh(mesh),
        pytest.raises(ValueError, match="splits an axis of size 6 over 8 devices; expected a size"),
    ):
        losses.sft(**arguments, partition=mesh_lib.rows_in_context())
    with pytest.raises(
        ValueError, match=r"policy has aggregation 'token' .* expected the same values"
    ):
        joint(data, True, policy=losses.PolicyGradient(aggregation="token"))
    logits = jnp.zeros((2, 3, V))
    with pytest.raises(
        ValueError, match=r"shape \[2, 3, 12\] and teacher_logits has shape \[2, 12\]"
    ):
        losses.reverse_kl(student_logits=logits, teacher_logits=logits[:, 0])
    with pytest.raises(ValueError, match=r"tokens has shape \[2\]; expected \[2, 3\]"):
        losses.token_logprobs(logits, jnp.zeros(2, int))
    with pytest.raises(ValueError, match="k is 0; expected at least 1"):
        losses.top_k(student_logits=logits, teacher_logits=logits, k=0)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "logits"])
def test_bad_values_of_active_tokens_make_the_loss_nan_or_infinite(data, fused):
    active = np.argwhere(data["mask"])[0]

    def spoil(name, value):
        return data | {name: jnp.asarray(data[name]).at[tuple(active)].set(value)}

    for bad in (
        spoil("teacher_hidden", np.nan),
        spoil("hidden", np.nan),
        spoil("behaviour_logprobs", np.nan),
        spoil("tokens", -100),
        spoil("tokens", V),
        data | {"advantages": np.full(B, np.nan, np.float32)},
    ):
        assert not np.isfinite(joint(bad, fused)[0].sum)
    for infinite in (spoil("behaviour_logprobs", -np.inf), spoil("behaviour_logprobs", np.inf)):
        for ratio in ("token", "sequence"):
            policy = losses.PolicyGradient(ratio=ratio)
            assert np.isnan(joint(infinite, fused, policy=policy)[0].sum)
    assert np.isnan(joint(data, fused, row_weight=np.arange(B) - 1.0)[0].sum)


CHECKED = {
    "row_weight is negative": {"row_weight": np.arange(B) - 1.0},
    "advantages are not finite": {"advantages": np.full(B, np.inf, np.float32)},
    "behaviour_logprobs are above 0": {"behaviour_logprobs": np.full((B, T), 0.5)},
    "behaviour_logprobs are .* not finite": {"behaviour_logprobs": np.full((B, T), -np.inf)},
    "outcomes are not disjoint": {"outcomes": (np.ones(B, bool),) * 3},
}


@pytest.mark.parametrize(("message", "changes"), CHECKED.items(), ids=CHECKED)
def test_checkify_names_bad_values(data, message, changes):
    loss = lambda hidden, changes: joint(data, True, hidden=hidden, **changes)[0].sum
    checked = checkify.checkify(jax.jit(jax.value_and_grad(loss)))
    error, (value, _) = checked(data["hidden"], {})
    error.throw()
    np.testing.assert_allclose(value, loss(data["hidden"], {}), rtol=1e-6)
    with pytest.raises(checkify.JaxRuntimeError, match=message):
        checked(data["hidden"], changes)[0].throw()


def test_checkify_names_a_teacher_that_is_not_finite(data):
    def loss(teacher):
        return logits_loss(data, teacher=teacher).sum

    error, _ = checkify.checkify(loss)(jnp.full((B, T, V), jnp.nan))
    with pytest.raises(checkify.JaxRuntimeError, match="divergence is not finite somewhere"):
        error.throw()
