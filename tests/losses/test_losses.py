"""Compares every loss and option, on logits and from hidden states, with float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from jax.test_util import check_grads

from opsd_jax import losses

B, T, D, V = 4, 6, 5, 9
CHUNK = 4  # at least five tokens are active: several chunks, the last one not full


def assert_near(got, expected, relative=1e-5):
    """Asserts equality within `relative` times the largest expected absolute value.

    The values are float32 sums whose terms cancel.
    """
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    scale = max(np.abs(expected).max(initial=0), 1e-3)
    np.testing.assert_allclose(got, expected, rtol=0, atol=relative * scale)


def unembed(params, hidden):
    return jnp.einsum("...d,dv->...v", hidden, params["head"], preferred_element_type=jnp.float32)


@pytest.fixture(scope="module")
def batch():
    """Rows of 6, 3, 0 and 1 tokens: correct, incorrect, truncated and correct."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(0, 1, shape).astype(np.float32)
    student = {"params": {"head": normal(D, V)}, "hidden": normal(B, T, D)}
    teacher = {"params": {"head": normal(D, V)}, "hidden": normal(B, T, D)}
    return {
        "student": student,
        "teacher": teacher,
        "logits": np.asarray(unembed(**student)),
        "teacher_logits": np.asarray(unembed(**teacher)),
        "mask": np.arange(T) < np.array([6, 3, 0, 1])[:, None],
        "outcomes": np.array([[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0]], bool),
        "tokens": rng.integers(0, V, (B, T)),
        "behaviour": -rng.uniform(1.5, 3.5, (B, T)).astype(np.float32),
        "old": -rng.uniform(1.5, 3.5, (B, T)).astype(np.float32),
        "reference": -rng.uniform(1.5, 3.5, (B, T)).astype(np.float32),
        "advantages": np.array([1.0, -2.0, 1.0, -0.5], np.float32),
    }


def head(part, params=None, hidden=None):
    return losses.Head(
        unembed,
        part["params"] if params is None else params,
        part["hidden"] if hidden is None else hidden,
    )


def both_forms(loss, batch):
    """Computes `loss(student, teacher)` and its gradients, on logits and on heads.

    Returns:
      ((sum, weight), gradient of the logits), and ((sum, weight), gradients of params and hidden).
    """

    def on_logits(logits):
        out = loss(logits, batch["teacher_logits"])
        return out.sum, out.weight

    def on_heads(params, hidden):
        out = loss(head(batch["student"], params, hidden), head(batch["teacher"]))
        return out.sum, out.weight

    whole = jax.jit(jax.value_and_grad(on_logits, has_aux=True))(jnp.asarray(batch["logits"]))
    student = batch["student"]
    fused = jax.jit(jax.value_and_grad(on_heads, argnums=(0, 1), has_aux=True))(
        student["params"], student["hidden"]
    )
    return whole, fused


def check_both_forms(loss, batch, expected, frozen_expected):
    """Compares both forms of a loss and their gradients with the reference.

    Args:
      loss: `(student, teacher) -> Loss`, on logits or heads.
      batch: the fixture.
      expected: the reference's (sum, weight).
      frozen_expected: `(logits) -> (sum, weight)`, whose gradient is expected.
    """
    (value, slope), (fused_value, (of_params, of_hidden)) = both_forms(loss, batch)
    assert_near(value, expected)
    exact = reference.gradient(frozen_expected, batch["logits"])
    assert_near(slope, exact)
    assert_near(fused_value, value)
    hidden = batch["student"]["hidden"].astype(np.float64)
    assert_near(of_params["head"], np.einsum("btd,btv->dv", hidden, exact))
    assert_near(of_hidden, exact @ batch["student"]["params"]["head"].T.astype(np.float64))


ALL = (1.0, 1.0, 1.0)
OPSD_OPTIONS = {
    "the paper": losses.OPSD(),
    "incorrect only": losses.OPSD(gate=(0.0, 1.0, 1.0)),
    "hybrid": losses.OPSD(gate=(1.0, 0.25, 0.5)),
    "forward": losses.OPSD(ALL, "forward_kl"),
    "jsd": losses.OPSD(ALL, "jsd"),
    "jsd 0.1": losses.OPSD(ALL, "jsd", beta=0.1),
    "jsd 0": losses.OPSD(ALL, "jsd", beta=0.0),
    "jsd 1": losses.OPSD(ALL, "jsd", beta=1.0),
    "skewed": losses.OPSD(ALL, "skewed_kl", alpha=0.2),
    "skewed 1": losses.OPSD(ALL, "skewed_kl", alpha=1.0),
    "sampled": losses.OPSD(ALL, "sampled_kl"),
    "sampled, control variate": losses.OPSD(ALL, "sampled_kl", control_variate=True),
    "by outcome": losses.OPSD((1.0, 0.5, 0.5), "reverse_kl, forward_kl,jsd"),
    "by outcome, sampled": losses.OPSD(ALL, "sampled_kl,reverse_kl,reverse_kl"),
    "clip": losses.OPSD(ALL, clip=0.5),
    "clip, sampled": losses.OPSD(ALL, "sampled_kl", clip=0.5),
    "importance": losses.OPSD(ALL, importance_cap=1.2),
    "skip": losses.OPSD(ALL, skip_first=2),
    "first": losses.OPSD(ALL, first_only=3),
    "window": losses.OPSD(ALL, first_only=4, skip_first=1),
    "linear": losses.OPSD(ALL, position="linear", late=3.0),
    "exponential": losses.OPSD(ALL, position="exponential", rate=-1.0),
    "sigmoid": losses.OPSD(ALL, position="sigmoid"),
    "token": losses.OPSD(ALL, aggregation="token"),
    "token, linear": losses.OPSD((1.0, 0.5, 0.0), aggregation="token", position="linear"),
    "fixed": losses.OPSD(ALL, aggregation="fixed", length=8.0),
    **{
        f"top 3 of {support}, {rest}, {name}": losses.OPSD(
            ALL, name, top_k=3, support=support, rest=rest
        )
        for support in ("teacher", "student", "union")
        for rest in ("bucket", "renormalise")
        for name in ("reverse_kl", "forward_kl", "jsd")
    },
    "everything": losses.OPSD(
        gate=(1.0, 0.5, 0.25),
        divergence="jsd,forward_kl,reverse_kl",
        beta=0.3,
        top_k=4,
        support="union",
        clip=0.4,
        importance_cap=1.5,
        skip_first=1,
        position="sigmoid",
        aggregation="token",
    ),
}


def opsd_loss(batch, options, student, teacher, temperature=1.0):
    return losses.opsd(
        student=student,
        teacher=teacher,
        mask=batch["mask"],
        outcomes=tuple(batch["outcomes"]),
        tokens=batch["tokens"],
        behaviour_logprobs=batch["behaviour"],
        options=options,
        temperature=temperature,
        chunk=CHUNK,
    )


@pytest.mark.parametrize("options", OPSD_OPTIONS.values(), ids=OPSD_OPTIONS)
def test_opsd(batch, options):
    temperature = 1.3 if options.top_k or options.importance_cap else 1.0

    def loss(student, teacher):
        return opsd_loss(batch, options, student, teacher, temperature)

    def expected(logits=batch["logits"]):
        names = ("teacher_logits", "mask", "outcomes", "tokens", "behaviour")
        return reference.opsd(
            logits, *(batch[n] for n in names), options, temperature, frozen=batch["logits"]
        )

    check_both_forms(loss, batch, expected(), expected)


PG_OPTIONS = {
    "default": (losses.PolicyGradient(), ()),
    "clip higher, token": (losses.PolicyGradient(clip_high=0.9, aggregation="token"), ()),
    "dual clip": (losses.PolicyGradient(dual_clip=1.1), ()),
    "reference": (losses.PolicyGradient(kl_coefficient=0.1), ("reference",)),
    "truncated importance": (losses.PolicyGradient(importance_cap=1.1), ("old",)),
    "no truncated importance": (losses.PolicyGradient(importance_cap=0.0), ("old",)),
    "cispo": (losses.PRESETS["cispo"], ()),
    "cispo, bounds": (losses.PolicyGradient(clip="cispo"), ()),
    "none, fixed": (losses.PolicyGradient(clip="none", aggregation="fixed", length=7.0), ()),
    "gspo": (losses.PRESETS["gspo"]._replace(clip_low=0.4, clip_high=0.9), ()),
    "gspo, clipped": (losses.PRESETS["gspo"], ()),
    "sequence, no clip": (losses.PolicyGradient(ratio="sequence", clip="none"), ()),
    "everything": (
        losses.PolicyGradient(clip_low=0.3, dual_clip=1.5, kl_coefficient=0.2, importance_cap=1.3),
        ("old", "reference"),
    ),
}


@pytest.mark.parametrize(("options", "given"), PG_OPTIONS.values(), ids=PG_OPTIONS)
def test_policy_gradient(batch, options, given):
    extra = {name: batch[name] if name in given else None for name in ("old", "reference")}
    temperature = 0.8

    def loss(student, teacher):
        del teacher
        return losses.policy_gradient(
            student=student,
            tokens=batch["tokens"],
            mask=batch["mask"],
            advantages=batch["advantages"],
            behaviour_logprobs=batch["behaviour"],
            old_logprobs=extra["old"],
            reference_logprobs=extra["reference"],
            options=options,
            temperature=temperature,
            chunk=CHUNK,
        )

    def expected(logits=batch["logits"]):
        names = ("mask", "tokens", "advantages", "behaviour")
        return reference.policy_gradient(
            logits,
            *(batch[n] for n in names),
            extra["old"],
            extra["reference"],
            options,
            temperature,
            frozen=batch["logits"],
        )

    check_both_forms(loss, batch, expected(), expected)


@pytest.mark.parametrize("aggregation", ["token", "sequence", "fixed"])
def test_sft(batch, aggregation):
    row_weight = np.array([1.0, 0.5, 2.0, 0.0], np.float32)

    def loss(student, teacher):
        del teacher
        return losses.sft(
            student=student,
            tokens=batch["tokens"],
            mask=batch["mask"],
            row_weight=row_weight,
            aggregation=aggregation,
            length=4.0,
            chunk=CHUNK,
        )

    def expected(logits=batch["logits"]):
        logp = reference.log_softmax(logits)
        total = weight = 0.0
        for b, n in enumerate(batch["mask"].sum(axis=1)):
            each = [-logp[b, t, batch["tokens"][b, t]] for t in range(n)]
            divisor = {"token": 1, "sequence": max(n, 1), "fixed": 4}[aggregation]
            total += row_weight[b] * sum(each) / divisor
            weight += row_weight[b] * (n if aggregation == "token" else n > 0)
        return total, weight

    check_both_forms(loss, batch, expected(), expected)
    result = loss(batch["logits"], None)
    right = (batch["logits"].argmax(-1) == batch["tokens"]) & batch["mask"]
    right[3] = False  # its row weight is 0
    assert result.metric("accuracy") == (right.sum(), 9)


def joint_loss(batch, student, teacher, **changes):
    arguments = {
        "tokens": batch["tokens"],
        "mask": batch["mask"],
        "advantages": batch["advantages"],
        "outcomes": tuple(batch["outcomes"]),
        "behaviour_logprobs": batch["behaviour"],
        "distillation": losses.OPSD(gate=(1.0, 0.5, 0.0), clip=0.9),
        "policy_weight": 0.7,
        "distillation_weight": 0.3,
        "chunk": CHUNK,
    }
    return losses.joint(student=student, teacher=teacher, **arguments | changes)


def test_joint(batch):
    """The objective is the weighted sum of both parts, divided by the number of all rollouts."""
    options, policy = losses.OPSD(gate=(1.0, 0.5, 0.0), clip=0.9), losses.PolicyGradient()

    def expected(logits=batch["logits"]):
        frozen = {"frozen": batch["logits"]}
        names = ("mask", "tokens", "advantages", "behaviour")
        gradient, weight = reference.policy_gradient(
            logits, *(batch[n] for n in names), None, None, policy, **frozen
        )
        names = ("teacher_logits", "mask", "outcomes", "tokens", "behaviour")
        distilled, _ = reference.opsd(logits, *(batch[n] for n in names), options, **frozen)
        return 0.7 * gradient + 0.3 * distilled, weight

    check_both_forms(lambda s, t: joint_loss(batch, s, t)[0], batch, expected(), expected)
    _, policy_part, opsd_part = joint_loss(batch, batch["logits"], batch["teacher_logits"])
    alone = losses.opsd(
        student=batch["logits"],
        teacher=batch["teacher_logits"],
        mask=batch["mask"],
        outcomes=tuple(batch["outcomes"]),
        options=options,
    )
    assert_near(opsd_part.mean, alone.mean)
    assert_near(opsd_part.metric("divergence"), alone.metric("divergence"))
    assert float(policy_part.weight) == 3


# Divergences on their own.

DIVERGENCES = {
    "reverse_kl": losses.reverse_kl,
    "forward_kl": losses.forward_kl,
    "jsd": losses.jsd,
    "jsd 0.2": lambda **x: losses.jsd(**x, beta=0.2),
    "skewed_kl": losses.skewed_kl,
    "skewed 0.1": lambda **x: losses.skewed_kl(**x, alpha=0.1),
}
each_divergence = pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)


@pytest.fixture
def logits():
    return np.random.default_rng(1).normal(0, 3, (2, 4, 5, 11)).astype(np.float32)


@each_divergence
def test_equal_logits_have_a_divergence_of_exactly_0(divergence, logits):
    equal = divergence(student_logits=logits[0], teacher_logits=logits[0], temperature=0.7)
    np.testing.assert_array_equal(equal, np.zeros((4, 5)))


@pytest.mark.parametrize("options", OPSD_OPTIONS.values(), ids=OPSD_OPTIONS)
def test_equal_student_and_teacher_have_a_loss_of_exactly_0(batch, options):
    for same in (batch["logits"], head(batch["student"])):
        assert float(opsd_loss(batch, options, same, same).sum) == 0


@each_divergence
def test_gradients_of_both_sides_match_finite_differences(divergence, logits):
    check_grads(
        lambda s, t: divergence(student_logits=s, teacher_logits=t, temperature=1.5),
        (jnp.asarray(logits[0, :1, :2] / 3), jnp.asarray(logits[1, :1, :2] / 3)),
        order=1,
        modes=("rev",),
        atol=1e-2,
        rtol=1e-2,
    )


@each_divergence
def test_entries_impossible_on_both_sides_add_nothing(divergence, logits):
    student, teacher = logits
    padding = np.full((4, 5, 3), -np.inf, np.float32)
    wide = [np.concatenate([x, padding], axis=-1) for x in (student, teacher)]
    loss = lambda s, t: divergence(student_logits=s, teacher_logits=t).sum()
    np.testing.assert_allclose(loss(*wide), loss(student, teacher), rtol=1e-6)
    for side in (0, 1):
        gradient = jax.grad(loss, side)(*wide)
        np.testing.assert_array_equal(gradient[..., 11:], 0)
        assert_near(gradient[..., :11], jax.grad(loss, side)(student, teacher))


@pytest.mark.parametrize("ruled_out_by", ["student", "teacher"])
@each_divergence
def test_an_entry_impossible_on_one_side(divergence, ruled_out_by, logits):
    """A KL that divides by its probability is infinite; other values and gradients are finite."""
    sides = dict(zip(("student", "teacher"), logits.copy(), strict=True))
    sides[ruled_out_by][0, 0, 0] = -np.inf
    loss = lambda s, t: divergence(student_logits=s, teacher_logits=t)
    got = np.asarray(loss(sides["student"], sides["teacher"]))
    infinite = {"student": losses.forward_kl, "teacher": losses.reverse_kl}[ruled_out_by]
    assert np.isfinite(got.ravel()[1:]).all()
    if divergence is infinite:
        assert got[0, 0] == np.inf
        return
    assert np.isfinite(got[0, 0])
    nearly = sides[ruled_out_by].copy()
    nearly[0, 0, 0] = -60
    close = loss(*(nearly if side == ruled_out_by else x for side, x in sides.items()))
    np.testing.assert_allclose(got[0, 0], close[0, 0], rtol=1e-5)
    for side in (0, 1):
        gradient = jax.grad(lambda s, t: loss(s, t).sum(), side)(*sides.values())
        assert np.isfinite(gradient).all()


@each_divergence
def test_a_vocabulary_padded_by_a_very_low_logit_on_one_side(divergence, logits):
    """A probability that underflows on one side counts as 0 on both."""
    low, never = (np.full((4, 5, 2), x, np.float32) for x in (-1e9, -np.inf))
    expected = divergence(student_logits=logits[0], teacher_logits=logits[1])
    loss = lambda s, t: divergence(student_logits=s, teacher_logits=t)
    for student, teacher in ((low, never), (never, low)):
        pads = np.concatenate([logits[0], student], -1), np.concatenate([logits[1], teacher], -1)
        assert_near(loss(*pads), expected)
        for side in (0, 1):
            gradient = jax.grad(lambda *x: loss(*x).sum(), side)(*pads)
            assert np.isfinite(gradient).all()


def test_a_support_that_the_student_rules_out():
    student, teacher = jnp.array([[-jnp.inf, 1.0, 2.0, 0.0]]), jnp.array([[5.0, 0.0, 1.0, 0.3]])

    def loss(student):
        s, t = losses.top_k(student_logits=student, teacher_logits=teacher, k=1)
        return losses.reverse_kl(student_logits=s, teacher_logits=t).sum()

    value, gradient = jax.value_and_grad(loss)(student)
    assert np.isfinite(value)
    # The bucket has all of the student's probability, whatever its logits are.
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


@each_divergence
def test_nan_makes_only_its_own_token_nan(divergence, logits):
    for side in (0, 1):
        spoilt = [x.copy() for x in logits]
        spoilt[side][1, 2, 3] = np.nan
        got = np.asarray(divergence(student_logits=spoilt[0], teacher_logits=spoilt[1]))
        assert np.isnan(got[1, 2])
        assert np.isfinite(got).sum() == got.size - 1


@each_divergence
def test_bfloat16_logits_are_computed_in_float32(divergence, logits):
    low = logits.astype(jnp.bfloat16)
    got = divergence(student_logits=low[0], teacher_logits=low[1])
    exact = np.asarray(low, np.float32)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, divergence(student_logits=exact[0], teacher_logits=exact[1]))


def test_divergences_agree_with_optax(logits):
    s, t = jax.nn.log_softmax(logits[0]), jax.nn.log_softmax(logits[1])
    sides = {"student_logits": logits[0], "teacher_logits": logits[1]}
    # optax takes (log predictions, targets) and returns KL(targets || predictions).
    assert_near(losses.reverse_kl(**sides), optax.losses.kl_divergence(t, jnp.exp(s)))
    assert_near(losses.forward_kl(**sides), optax.losses.kl_divergence(s, jnp.exp(t)))


def test_jsd_ends_at_the_kls_and_is_symmetric_in_the_middle(logits):
    logits = logits / 4  # close to the limits only if beta is small compared with T / S
    sides = {"student_logits": logits[0], "teacher_logits": logits[1]}
    swapped = {"student_logits": logits[1], "teacher_logits": logits[0]}
    np.testing.assert_array_equal(losses.jsd(**sides, beta=0), losses.forward_kl(**sides))
    np.testing.assert_array_equal(losses.jsd(**sides, beta=1.0), losses.reverse_kl(**sides))
    np.testing.assert_allclose(losses.jsd(**sides), losses.jsd(**swapped), rtol=1e-5)
    # The formula divided by beta, or by 1 - beta, has the two KLs as its limits.
    np.testing.assert_allclose(
        losses.jsd(**sides, beta=1e-3) / 1e-3, losses.forward_kl(**sides), rtol=0.05
    )
    np.testing.assert_allclose(
        losses.jsd(**sides, beta=0.999) / 1e-3, losses.reverse_kl(**sides), rtol=0.05
    )


def test_top_k_of_the_whole_vocabulary_changes_nothing(logits):
    sides = {"student_logits": logits[0], "teacher_logits": logits[1]}
    for rest in ("bucket", "renormalise"):
        for support in ("teacher", "student", "union"):
            s, t = losses.top_k(**sides, k=11, support=support, rest=rest)
            got = losses.reverse_kl(student_logits=s, teacher_logits=t)
            np.testing.assert_allclose(got, losses.reverse_kl(**sides), rtol=2e-5)


def test_a_bucket_bounds_the_divergence_from_below(logits):
    sides = {"student_logits": logits[0], "teacher_logits": logits[1]}
    values = []
    for k in (1, 2, 4, 8, 11):
        s, t = losses.top_k(**sides, k=k)
        values.append(losses.reverse_kl(student_logits=s, teacher_logits=t))
    values = np.array([*values, losses.reverse_kl(**sides)])
    assert (values >= -1e-6).all()
    assert (np.diff(values, axis=0) > -1e-5 * values[-1]).all()


def test_sampled_kl_is_unbiased(logits):
    """The expected value is the KL, and the expected gradient is its gradient, in both variants."""
    student, teacher = jnp.asarray(logits[0, 0, 0]), jnp.asarray(logits[1, 0, 0])
    entries, p = jnp.arange(11), jax.nn.softmax(student)
    exact = lambda s: losses.reverse_kl(student_logits=s, teacher_logits=teacher)
    for control_variate in (False, True):

        def expectation(s, control_variate=control_variate):
            each = losses.sampled_kl(
                student_logits=jnp.broadcast_to(s, (11, 11)),
                teacher_logits=jnp.broadcast_to(teacher, (11, 11)),
                tokens=entries,
                control_variate=control_variate,
            )
            return (p * each).sum()

        assert_near(expectation(student), exact(student))
        assert_near(jax.grad(expectation)(student), jax.grad(exact)(student))


def absolute(*, student_logits, teacher_logits, power=1.0, beta):
    """A divergence of a user: beta sum_v |S(v) - T(v)|^power."""
    s, t = jax.nn.softmax(student_logits), jax.nn.softmax(teacher_logits)
    return beta * (jnp.abs(s - t) ** power).sum(axis=-1)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "logits"])
def test_a_user_can_add_divergences(batch, monkeypatch, fused):
    """Parameters named like an option receive it, unless functools.partial has set them."""
    monkeypatch.setitem(losses.DIVERGENCES, "absolute", absolute)
    fixed = functools.partial(absolute, power=2.0, beta=0.7)
    monkeypatch.setitem(losses.DIVERGENCES, "fixed", fixed)
    at_tokens = lambda *, student_logits, teacher_logits, tokens: losses.sampled_kl(
        student_logits=student_logits, teacher_logits=teacher_logits, tokens=tokens
    )
    monkeypatch.setitem(losses.DIVERGENCES, "at_tokens", at_tokens)
    sides = [batch["logits"], batch["teacher_logits"]]
    if fused:
        sides = [head(batch["student"]), head(batch["teacher"])]

    def value(options, tokens=None):
        return losses.opsd(
            student=sides[0],
            teacher=sides[1],
            mask=batch["mask"],
            outcomes=tuple(batch["outcomes"]),
            tokens=tokens,
            options=options,
            chunk=CHUNK,
        ).tokens["divergence"]

    logits = {"student_logits": batch["logits"], "teacher_logits": batch["teacher_logits"]}
    got = value(losses.OPSD(ALL, "absolute,fixed,absolute", beta=0.2))
    assert_near(got[0], absolute(**logits, beta=0.2)[0])
    assert_near(got[1, :3], fixed(**logits)[1, :3])
    assert_near(
        value(losses.OPSD(ALL, "at_tokens"), batch["tokens"]),
        value(losses.OPSD(ALL, "sampled_kl"), batch["tokens"]),
    )
    with pytest.raises(ValueError, match="tokens is None; expected"):
        value(losses.OPSD(ALL, "at_tokens"))


def test_kl_estimates(logits):
    s, t = (reference.log_softmax(x)[0, 0] for x in logits)
    got = losses.kl_estimates(
        student_logprobs=jnp.asarray(s, jnp.float32), teacher_logprobs=jnp.asarray(t, jnp.float32)
    )
    d = s - t
    assert_near(got["k1"], d)
    assert_near(got["k2"], d**2 / 2)
    assert_near(got["k3"], np.exp(-d) - 1 + d)
    exact = reference.kl(np.exp(s), np.exp(t))
    for name in ("k1", "k3"):
        assert_near((np.exp(s) * got[name]).sum(), exact)


@pytest.mark.parametrize("support", ["teacher", "student", "union"])
@pytest.mark.parametrize("sharp", [1.0, 6.0, 12.0])
def test_the_gradient_of_a_bucket_is_exact_where_the_top_entries_hold_everything(support, sharp):
    """Compares with float64, down to a bucket of probability e^-30."""
    rng = np.random.default_rng(4)
    student, teacher = rng.normal(size=(2, 6, 40)).astype(np.float32) * sharp
    k = 4

    def exact(x, y):
        """Returns the divergence, and its gradient s (log-ratio of the entry or bucket - value)."""
        log_s, log_t = reference.log_softmax(x), reference.log_softmax(y)
        by = {"teacher": [y], "student": [x], "union": [x, y]}[support]
        kept = np.zeros(x.shape, bool)
        for logits in by:
            np.put_along_axis(kept, np.argsort(-logits, -1)[:, :k], True, -1)
        others = lambda p: np.log(np.where(kept, 0, np.exp(p)).sum(-1, keepdims=True))
        ratio = np.where(kept, log_s - log_t, others(log_s) - others(log_t))
        value = (np.exp(log_s) * ratio).sum(-1, keepdims=True)
        return value[:, 0], np.exp(log_s) * (ratio - value)

    def ours(x):
        s, t = losses.top_k(student_logits=x, teacher_logits=teacher, k=k, support=support)
        return losses.reverse_kl(student_logits=s, teacher_logits=t)

    value, slope = exact(student.astype(np.float64), teacher.astype(np.float64))
    np.testing.assert_allclose(ours(student), value, rtol=2e-5, atol=1e-7)
    gradient = jax.jit(jax.grad(lambda x: ours(x).sum()))(student)
    scale = abs(slope).max(axis=-1, keepdims=True)
    # A log-probability is rounded to half a unit in the last place of the largest logit.
    rounding = 4 * np.finfo(np.float32).eps * abs(student).max()
    assert (abs(gradient - slope) <= 2e-5 * scale + rounding * jax.nn.softmax(student)).all()


def test_a_bucket_without_entries_has_probability_0_and_finite_gradients(logits):
    def value(x):
        s, t = losses.top_k(student_logits=x, teacher_logits=logits[1], k=11)
        assert s.shape[-1] == 12
        return losses.reverse_kl(student_logits=s, teacher_logits=t).sum(), s[..., -1]

    (_, bucket), gradient = jax.value_and_grad(value, has_aux=True)(logits[0])
    assert (bucket == -np.inf).all()
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("gap", [-200.0, -89.0, 89.0, 200.0])
def test_k3_is_finite_for_every_finite_log_ratio(gap):
    """With the log-ratio clipped to [-20, 20], as the policy ratio is."""
    student = jnp.array([-250.0])
    estimate = lambda s: losses.kl_estimates(student_logprobs=s, teacher_logprobs=-250.0 + gap)
    clipped = np.clip(gap, -20, 20)
    assert_near(estimate(student)["k3"], [np.expm1(clipped) - clipped])
    assert np.isfinite(jax.grad(lambda s: estimate(s)["k3"].sum())(student)).all()


def test_grpo_is_finite_where_the_reference_is_far_away():
    logits = jnp.zeros((1, 2, 5)).at[0, 0, 0].set(-100.0)

    def loss(x):
        return losses.policy_gradient(
            student=x,
            tokens=jnp.zeros((1, 2), jnp.int32),
            mask=jnp.ones((1, 2), bool),
            advantages=jnp.ones(1),
            behaviour_logprobs=losses.token_logprobs(logits, jnp.zeros((1, 2), jnp.int32)),
            reference_logprobs=jnp.full((1, 2), -1.0),
            options=losses.PRESETS["grpo"]._replace(kl_coefficient=0.1),
        )[0]

    value, gradient = jax.value_and_grad(loss)(logits)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_rewards_that_differ_by_rounding_carry_no_information():
    rewards = np.array([0.3, 0.1 + 0.2, 1.0, 1.0 + 1e-16, 0.1, 0.2, 0.0, 1e-9], np.float64)
    assert losses.informative(rewards, 2).tolist() == [False] * 4 + [True] * 4
    single = np.array([0.3, np.nextafter(np.float32(0.3), np.float32(1))], np.float32)
    for baseline in ("group", "leave_one_out", "batch"):
        scale = "none" if baseline == "batch" else "group"
        got = losses.advantages(single, group_size=2, baseline=baseline, scale=scale)
        assert (got == 0).all(), baseline


def test_token_logprobs_and_entropy(logits):
    tokens = np.random.default_rng(0).integers(0, 11, (4, 5))
    expected = np.take_along_axis(reference.log_softmax(logits[0] / 0.7), tokens[..., None], -1)
    assert_near(losses.token_logprobs(logits[0], tokens, 0.7), expected[..., 0])
    cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels
    sums = lambda f: jax.value_and_grad(lambda x: f(x, tokens).sum())(logits[0])
    for got, exact in zip(
        sums(losses.token_logprobs), sums(lambda x, y: -cross_entropy(x, y)), strict=True
    ):
        assert_near(got, exact)
    log_p = reference.log_softmax(logits[0])
    assert_near(losses.entropy(logits[0]), -(np.exp(log_p) * log_p).sum(-1))
    wide = np.concatenate([logits[0], np.full((4, 5, 2), -np.inf, np.float32)], axis=-1)
    assert_near(losses.entropy(wide), losses.entropy(logits[0]))
    assert_near(losses.token_logprobs(wide, tokens), losses.token_logprobs(logits[0], tokens))
    outside = np.asarray(losses.token_logprobs(logits[0], np.array([[-1, 11, -100, 0, 10]] * 4)))
    np.testing.assert_array_equal(np.isnan(outside), [[True, True, True, False, False]] * 4)


# Weights.


def test_gates():
    masks = np.eye(3, dtype=bool)
    for name, expected in {"correct": (1, 0, 0), "incorrect": (0, 1, 1), "all": (1, 1, 1)}.items():
        assert losses.parse_gate(name) == expected
        np.testing.assert_array_equal(
            losses.gate_weights(*masks, losses.parse_gate(name)), expected
        )
    assert losses.parse_gate("1, 0.5,0") == (1, 0.5, 0)


@pytest.mark.parametrize("text", ["corect", "1,2", "0,0,0", "1,-1,0", "1,nan,0", "inf,0,0", ""])
def test_a_bad_gate_raises(text):
    with pytest.raises(ValueError, match="gate is"):
        losses.parse_gate(text)


@pytest.mark.parametrize("kind", ["uniform", "linear", "exponential", "sigmoid"])
def test_position_weights(kind):
    """The mean is 1 over the tokens of a row, and the side of the padding does not matter."""
    mask = np.array([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]], bool)
    got = np.asarray(losses.position_weights(mask, kind, late=3.0, rate=1.5))
    np.testing.assert_array_equal(got[~mask], 0)
    np.testing.assert_allclose(got[:3].sum(axis=1), [4, 4, 1], rtol=1e-6)
    np.testing.assert_allclose(got[0, 1:], got[1, :4], rtol=1e-6)
    by_hand = {
        "uniform": [1, 1, 1, 1],
        "linear": [0.5, 5 / 6, 7 / 6, 1.5],
        "exponential": np.exp([0, 0.5, 1, 1.5]) / np.exp([0, 0.5, 1, 1.5]).mean(),
        "sigmoid": (w := 0.25 + 0.75 / (1 + np.exp([3, 0.5, -2, -4.5]))) / w.mean(),
    }[kind]
    np.testing.assert_allclose(got[0, 1:], by_hand, rtol=1e-6)


@pytest.mark.parametrize("aggregation", ["token", "sequence", "fixed"])
def test_token_weights_ignore_masked_tokens(aggregation):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(4, 6)).astype(np.float32)
    mask = np.arange(6) < np.array([6, 3, 0, 1])[:, None]
    row_weight = np.array([1, 0.5, 2, 0], np.float32)
    weights, total = losses.token_weights(mask, row_weight, aggregation=aggregation, length=5)
    rows = [v[m].sum() for v, m in zip(values, mask, strict=True)]
    sums = {"token": rows, "sequence": rows / np.array([6, 3, 1, 1]), "fixed": np.array(rows) / 5}
    assert_near(losses.weighted_sum(values, weights), sums[aggregation] @ row_weight)
    assert float(total) == {"token": 7.5, "sequence": 1.5, "fixed": 1.5}[aggregation]
    spoilt = np.where(weights != 0, values, np.nan)
    assert_near(losses.weighted_sum(spoilt, weights), losses.weighted_sum(values, weights))
    gradient = jax.grad(lambda v: losses.weighted_sum(v, weights))(jnp.asarray(spoilt))
    np.testing.assert_array_equal(gradient, weights)


# Advantages and presets.


def test_advantages_by_hand():
    rewards = np.array([1, 0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0], np.float32)
    # Means 1/4, 1, 1/2; sample deviations 1/2, 0, 1/sqrt(3).
    one, half = 0.75 / 0.5, 0.5 * np.sqrt(3)
    by_hand = {
        ("group", "group"): [one, -0.5, -0.5, -0.5, 0, 0, 0, 0, half, half, -half, -half],
        ("group", "none"): [0.75, *[-0.25] * 3, 0, 0, 0, 0, 0.5, 0.5, -0.5, -0.5],
        # 1 - 0, 0 - 1/3; 1 - 1; 1 - 1/3, 0 - 2/3
        ("leave_one_out", "none"): [1, *[-1 / 3] * 3, 0, 0, 0, 0, 2 / 3, 2 / 3, -2 / 3, -2 / 3],
        # Mean 7/12, deviation sqrt(7 * 5) / 12
        ("batch", "batch"): (np.array(rewards) * 12 - 7) / np.sqrt(35),
        # Deviation of group/none: sqrt((0.75 + 0 + 1) / 12)
        ("group", "batch"): np.array([0.75, *[-0.25] * 3, 0, 0, 0, 0, 0.5, 0.5, -0.5, -0.5])
        / np.sqrt(1.75 / 12),
    }
    for (baseline, scale), expected in by_hand.items():
        arguments = {"baseline": baseline, "scale": scale}
        got = losses.advantages(rewards, 4, **arguments)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(
            losses.advantages(jnp.asarray(rewards), 4, **arguments), got, rtol=1e-5, atol=1e-6
        )
    # The means of equal rewards are rounded.
    for equal in (np.ones(4), np.full(7, 10.1, np.float32), jnp.full(8, 0.1)):
        for baseline, scale in by_hand:
            got = losses.advantages(equal, len(equal), baseline=baseline, scale=scale)
            np.testing.assert_array_equal(got, 0)
    assert losses.informative([1.0, np.nan, 1.0, 1.0], 2).tolist() == [True, True, False, False]
    np.testing.assert_array_equal(
        losses.informative(rewards, 4), [True] * 4 + [False] * 4 + [True] * 4
    )
    single = losses.advantages(np.array([1.0, 0.0]), 1, baseline="batch", scale="batch")
    np.testing.assert_allclose(single, [1, -1], rtol=1e-5)


@pytest.mark.parametrize("group_size", [0, 1, 5])
def test_advantages_raise_for_a_bad_group_size(group_size):
    with pytest.raises(ValueError, match=f"group_size is {group_size}, and there are 12 rewards"):
        losses.advantages(np.zeros(12), group_size)


def test_overlong_penalty_by_hand():
    lengths = np.array([0, 60, 80, 90, 100, 120])
    got = losses.overlong_penalty(lengths, max_tokens=100, buffer=20, factor=0.5)
    np.testing.assert_allclose(got, [0, 0, 0, -0.25, -0.5, -0.5])
    unsigned = losses.overlong_penalty(lengths.astype(np.uint16), max_tokens=100, buffer=20)
    np.testing.assert_allclose(unsigned, [0, 0, 0, -0.5, -1, -1])
    with pytest.raises(ValueError, match="buffer is 101; expected a number in"):
        losses.overlong_penalty(lengths, max_tokens=100, buffer=101)


# The advantage of the first of two rewards 1, 0: 0.5 above the mean, divided by sqrt(1/2).
A = np.sqrt(0.5)
PRESETS_BY_HAND = {
    # Row 0: (-1.2 A - A) / 2, with its first ratio clipped; row 1: 0.8 A, with its ratio clipped.
    # The advantages of the other two are 0. Row 3 is half as likely as under the reference.
    "grpo": (-1.1 * A + 0.8 * A + 0.04 * (1 - np.log(2)), 4),
    # Advantages of 0.5 and -0.5; every row is divided by a length of 4.
    "dr_grpo": ((-0.6 - 0.5 + 0.4) / 4, 4),
    # The ratio is clipped at 1.28; three tokens are active.
    "dapo": (-1.28 * A - A + 0.8 * A, 3),
    # One ratio per row, sqrt(1.5) and 0.5, clipped to [0.9997, 1.0004].
    "gspo": (-1.0004 * A + 0.9997 * A, 4),
    # Advantages of 1 and -1; sums over tokens.
    "rloo": (-1.5 - 1 + 0.5, 4),
    # Mean 3/4, deviation sqrt(3)/4: advantages of 1/sqrt(3) and, for row 1, -sqrt(3).
    "reinforce++": ((-1.2 - 1 - 3 - 1.2) / np.sqrt(3) + 0.8 * np.sqrt(3), 7),
    "cispo": (-A * (1.5 * np.log(0.6) + np.log(0.5)) + A * 0.5 * np.log(0.2), 7),
}


@pytest.mark.parametrize("name", losses.PRESETS)
def test_presets_by_hand(name):
    """Two groups of two rollouts: rewards (1, 0) and (1, 1), and 2, 1, 3 and 1 tokens."""
    new = np.array([[0.6, 0.5, 1, 1], [0.2, 1, 1, 1], [0.3, 0.3, 0.3, 1], [0.8, 1, 1, 1]])
    ratio = np.array([[1.5, 1, 1, 1], [0.5, 1, 1, 1], [1, 1, 1, 1], [2, 1, 1, 1]])
    mask = np.arange(4) < np.array([2, 1, 3, 1])[:, None]
    above = np.array([1, 1, 1, 2])[:, None]  # reference / new
    rewards = np.array([1, 0, 1, 1], np.float32)
    options = losses.PRESETS[name]
    if name == "dr_grpo":
        options = options._replace(length=4.0)
    other = np.where(mask, 1 - new, 0.5)
    loss = losses.policy_gradient(
        student=jnp.log(jnp.asarray(np.stack([new, other], axis=-1), jnp.float32)),
        tokens=np.zeros((4, 4), int),
        mask=mask,
        advantages=options.advantages(rewards, 2),
        behaviour_logprobs=np.log(new / ratio).astype(np.float32),
        reference_logprobs=np.log(new * above).astype(np.float32),
        row_weight=losses.informative(rewards, 2) if options.drop_uninformative else 1.0,
        options=options,
    )
    total, weight = PRESETS_BY_HAND[name]
    np.testing.assert_allclose(loss.sum, total, rtol=1e-4)  # 1e-6 is added to the deviations
    assert float(loss.weight) == weight


def test_gradient_is_zero_where_clipped_and_reinforce_at_ratio_one():
    behaviour = np.log(np.array([[0.5, 0.5 / 1.5, 0.9]], np.float32))
    loss = lambda logits: (
        losses.policy_gradient(
            student=logits,
            tokens=np.zeros((1, 3), int),
            mask=np.ones((1, 3), bool),
            advantages=np.array([[2.0, 2.0, -2.0]], np.float32),
            behaviour_logprobs=behaviour,
            options=losses.PolicyGradient(aggregation="token"),
        ).sum
    )
    # d log p / d logits is (1/2, -1/2) at p = 1/2; the second and third ratio are clipped.
    np.testing.assert_allclose(
        jax.grad(loss)(jnp.zeros((1, 3, 2))), [[[-1, 1], [0, 0], [0, 0]]], atol=1e-6
    )
