"""Divergences of a student S from a teacher T over the vocabulary, per token and unreduced.

With a = log S(v), b = log T(v), each is a sum over words of

    kl_term(x, y, w) = e^x (x - log((1 - w) e^x + w e^y)),

the contribution of a word to KL(X || (1 - w) X + w Y): w = 1 is the plain KL(X || Y).

| function | equation | here |
|---|---|---|
| `reverse_kl` | KL(S \\|\\| T) | kl_term(a, b, 1) |
| `forward_kl` | KL(T \\|\\| S) | kl_term(b, a, 1) |
| `jsd` | beta KL(T \\|\\| M) + (1 - beta) KL(S \\|\\| M), M = beta T + (1 - beta) S | both, mixed |
| `skewed_kl` | KL(S \\|\\| alpha T + (1 - alpha) S) | kl_term(a, b, alpha) |

Equal logits give 0 to the last bit, in every form. A word with logit -inf on the side whose
probability stands before the logarithm has a term of 0 and gradients of 0. If the other side alone
rules a word out, `reverse_kl` and `forward_kl` are +inf (as they are), the mixtures finite. NaN
stays NaN.

Gradients flow to both sides: stop them at the teacher's. They come in reverse mode.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from opsd_jax.losses.checks import check_option, check_range
from opsd_jax.losses.likelihood import at_temperature, log_normaliser, token_logprobs

# (log S, log T) of a word -> its term of the divergence.
Term = Callable[[jax.Array, jax.Array], jax.Array]


def reverse_kl(
    *, student_logits: jax.Array, teacher_logits: jax.Array, temperature: float = 1.0
) -> jax.Array:
    """KL(S || T) = sum_v S(v) (log S(v) - log T(v)): OPSD's divergence (arXiv 2605.06188, eq. 1).

    Mode-seeking: the student leaves what the teacher finds unlikely.

    Args:
      student_logits: [..., V].
      teacher_logits: [..., V], over the same words.
      temperature: above 0; divides the logits of both sides. The result is not multiplied by its
        square, as in Hinton et al. (arXiv 1503.02531): do that where you want it.

    Returns:
      float32 [...].

    Raises:
      ValueError: the shapes differ; names both.
    """
    return _divergence(_reverse, student_logits, teacher_logits, temperature)


def forward_kl(
    *, student_logits: jax.Array, teacher_logits: jax.Array, temperature: float = 1.0
) -> jax.Array:
    """KL(T || S) = sum_v T(v) (log T(v) - log S(v)), mode-covering; otherwise as `reverse_kl`."""
    return _divergence(_forward, student_logits, teacher_logits, temperature)


def jsd(
    *,
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    temperature: float = 1.0,
    beta: float = 0.5,
) -> jax.Array:
    """Generalised Jensen-Shannon divergence (GKD, arXiv 2306.13649, eq. 1); else as `reverse_kl`.

    beta KL(T || M) + (1 - beta) KL(S || M) with M = beta T + (1 - beta) S. As in TRL and Liger,
    beta = 0 *is defined as* the forward and 1 as the reverse KL. The formula itself goes to 0 at
    both ends (divided by beta, or 1 - beta, it goes to these), so there is a jump.

    Args:
      student_logits, teacher_logits, temperature: as in `reverse_kl`.
      beta: in [0, 1].
    """
    check_range("beta", beta, 0, 1)
    mixed: Term = functools.partial(_jensen_shannon, beta)
    term = _forward if beta == 0 else _reverse if beta == 1 else mixed
    return _divergence(term, student_logits, teacher_logits, temperature)


def skewed_kl(
    *,
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    temperature: float = 1.0,
    alpha: float = 0.5,
) -> jax.Array:
    """KL(S || alpha T + (1 - alpha) S), the reverse KL to a target that stays near the student.

    DistiLLM's skewed reverse KL (arXiv 2402.03898) and the trust region of TROPD, whose reward is
    log(alpha T + (1 - alpha) S) - log S. alpha = 1 is `reverse_kl`; it is bounded by
    -log(1 - alpha). The gradient is that of the whole expression, the S in the target included.

    Args:
      student_logits, teacher_logits, temperature: as in `reverse_kl`.
      alpha: the teacher's share, above 0 and at most 1.
    """
    check_range("alpha", alpha, 1e-6, 1)
    return _divergence(
        functools.partial(_kl_term, weight=alpha), student_logits, teacher_logits, temperature
    )


def sampled_kl(
    *,
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    tokens: jax.Array,
    temperature: float = 1.0,
    control_variate: bool = False,
) -> jax.Array:
    """The reverse KL's estimate at the sampled token y, with the policy gradient as its gradient.

    The value is log S(y) - log T(y) (k1 of `kl_estimates`): unbiased for KL(S || T) if y was drawn
    from S, and of either sign. Differentiating it would say nothing about the teacher; its gradient
    here is -A d log S(y) with the advantage A = log T(y) - log S(y) held fixed, unbiased for that
    of the reverse KL (arXiv 2605.06188, eq. 3; SDPO, Tinker, verl).

    Args:
      student_logits, teacher_logits, temperature: as in `reverse_kl`.
      tokens: int [...], drawn from the student at that temperature, without truncation.
      control_variate: add KL(S || T) to A (vOPD, arXiv 2605.07865), which then has mean 0: less
        variance, the same expectation.

    Returns:
      float32 [...].
    """
    student = token_logprobs(student_logits, tokens, temperature)
    teacher = token_logprobs(teacher_logits, tokens, temperature)
    k1 = jax.lax.stop_gradient(student - teacher)
    advantage = -k1
    if control_variate:
        baseline = reverse_kl(
            student_logits=student_logits, teacher_logits=teacher_logits, temperature=temperature
        )
        advantage += jax.lax.stop_gradient(baseline)
    return k1 - advantage * (student - jax.lax.stop_gradient(student))


def kl_estimates(student_logprobs: jax.Array, teacher_logprobs: jax.Array) -> dict[str, jax.Array]:
    """Estimates of KL(S || T) from log-probabilities of tokens drawn from S, of any shape.

    Schulman, "Approximating KL divergence" (2020): with d = log S - log T, `k1` = d is unbiased,
    `k2` = d^2 / 2 biased with less variance, `k3` = e^-d - 1 + d unbiased and never negative.
    """
    d = student_logprobs - teacher_logprobs
    return {"k1": d, "k2": d * d / 2, "k3": jnp.expm1(-d) + d}


SUPPORTS = ("teacher", "student", "union")
RESTS = ("bucket", "renormalise")


def top_k(
    *,
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    k: int,
    support: str = "teacher",
    rest: str = "bucket",
) -> tuple[jax.Array, jax.Array]:
    """Both distributions over the k likeliest words, for any of the divergences here.

    Divide by the temperature first. With `rest="bucket"` the divergence of the result is a lower
    bound of that over all words, and never negative (the data-processing inequality); renormalised
    it is not a bound, and on the student's support its gradient is biased.

    Args:
      student_logits: [..., V].
      teacher_logits: [..., V].
      k: how many words, at least 1; all if it is V or more.
      support: whose k likeliest: "teacher" (NeMo-RL, verl, Tinker), "student" (SDPO, TRL) or
        "union" of both (miles).
      rest: what becomes of the other words' probability: "bucket", one more word with all of it
        (SDPO), or "renormalise" (siyan-zhao/OPSD, Tinker).

    Returns:
      Float32 log-probabilities `(student, teacher)` [..., K] over the same words; K is k, or 2 k
      for the union (words that both have stand once, and at -inf in the second half), and one more
      with a bucket. At least 1e-7 is left for a bucket.

    Raises:
      ValueError: the shapes differ, or an option is none of these.
    """
    _check_same_vocabulary(student_logits, teacher_logits)
    check_option("support", support, SUPPORTS)
    check_option("rest", rest, RESTS)
    if k < 1:
        raise ValueError(f"k is {k}; expected at least 1 word.")
    k = min(k, student_logits.shape[-1])
    student_logits, teacher_logits = (
        at_temperature(student_logits, 1),
        at_temperature(teacher_logits, 1),
    )

    def likeliest(logits):
        return jax.lax.top_k(jax.lax.stop_gradient(logits), k)[1]

    if support == "union":
        first, second = likeliest(teacher_logits), likeliest(student_logits)
        words = jnp.concatenate([first, second], axis=-1)
        again = (second[..., :, None] == first[..., None, :]).any(axis=-1)
        repeated = jnp.concatenate([jnp.zeros_like(again), again], axis=-1)
    else:
        words = likeliest(teacher_logits if support == "teacher" else student_logits)
        repeated = jnp.zeros(words.shape, bool)

    def restrict(logits):
        chosen = jnp.take_along_axis(logits, words, axis=-1) - log_normaliser(logits)[..., None]
        chosen = jnp.where(repeated, -jnp.inf, chosen)
        if rest == "renormalise":
            return chosen - log_normaliser(chosen)[..., None]
        covered = jnp.minimum(log_normaliser(chosen), -1e-7)
        return jnp.concatenate([chosen, jnp.log(-jnp.expm1(covered))[..., None]], axis=-1)

    return restrict(student_logits), restrict(teacher_logits)


def _check_same_vocabulary(student_logits: Any, teacher_logits: Any) -> None:
    if jnp.shape(student_logits) != jnp.shape(teacher_logits):
        raise ValueError(
            f"student_logits{list(jnp.shape(student_logits))} and teacher_logits"
            f"{list(jnp.shape(teacher_logits))} differ: they score the same tokens over one "
            "vocabulary. Where one is padded to more words, pad the other with -inf."
        )


def _divergence(term: Term, student_logits, teacher_logits, temperature) -> jax.Array:
    _check_same_vocabulary(student_logits, teacher_logits)
    return _sum_of_terms(
        term,
        at_temperature(student_logits, temperature),
        at_temperature(teacher_logits, temperature),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_of_terms(term: Term, student_logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
    """sum_v term(log S(v), log T(v)), of float32 logits [..., V].

    The backward pass computes softmaxes and terms anew from the logits: at V = 151,936 an array
    that is not kept is worth more than the exponentials.
    """
    return _sum_of_terms_fwd(term, student_logits, teacher_logits)[0]


def _sum_of_terms_fwd(term, student_logits, teacher_logits):
    totals = log_normaliser(student_logits), log_normaliser(teacher_logits)
    log_s, log_t = student_logits - totals[0][..., None], teacher_logits - totals[1][..., None]
    value = jnp.sum(term(log_s, log_t), axis=-1)
    return value, (student_logits, teacher_logits, totals, value)


def _sum_of_terms_bwd(term, residuals, cotangent):
    student_logits, teacher_logits, totals, value = residuals

    def derivative(totals, side):
        log_s, log_t = student_logits - totals[0][..., None], teacher_logits - totals[1][..., None]
        along = [
            jnp.ones_like(x) if i == side else jnp.zeros_like(x)
            for i, x in enumerate((log_s, log_t))
        ]
        return jax.jvp(term, (log_s, log_t), tuple(along))[1], jnp.exp((log_s, log_t)[side])

    gradients = []
    # Each pass over the vocabulary takes the result of the one before, times 0, so that XLA neither
    # runs them at once nor keeps an array for both: three arrays [..., V] at a time, not five.
    after = 0 * value
    for side in (0, 1):
        totals = tuple(n + after for n in totals)
        total = jnp.sum(derivative(totals, side)[0], axis=-1)
        after = 0 * total
        totals = tuple(n + after for n in totals)
        slope, probability = derivative(totals, side)
        gradients.append(cotangent[..., None] * (slope - probability * total[..., None]))
    return tuple(gradients)


_sum_of_terms.defvjp(_sum_of_terms_fwd, _sum_of_terms_bwd)


def _kl_term(x: jax.Array, y: jax.Array, weight: float) -> jax.Array:
    """e^x (x - log((1 - weight) e^x + weight e^y)); 0 where e^x is."""
    possible = jnp.exp(x) != 0  # not > 0: NaN is no impossible word
    # `where` on the inputs too: 0 * inf in the branch not taken would still make NaN gradients.
    x, y = jnp.where(possible, x, 0.0), jnp.where(possible, y, 0.0)
    gap = x - y if weight == 1 else -_log_mix(y - x, weight)
    return jnp.where(possible, jnp.exp(x) * gap, 0.0)


def _log_mix(d: jax.Array, weight: float) -> jax.Array:
    """log((1 - weight) + weight e^d), exactly 0 at d = 0 and without overflow."""
    positive = d > 0
    above, below = jnp.where(positive, d, 0.0), jnp.where(positive, 0.0, d)
    return jnp.where(
        positive,
        above + jnp.log1p((1 - weight) * jnp.expm1(-above)),
        jnp.log1p(weight * jnp.expm1(below)),
    )


def _reverse(log_s: jax.Array, log_t: jax.Array) -> jax.Array:
    return _kl_term(log_s, log_t, 1.0)


def _forward(log_s: jax.Array, log_t: jax.Array) -> jax.Array:
    return _kl_term(log_t, log_s, 1.0)


def _jensen_shannon(beta: float, log_s: jax.Array, log_t: jax.Array) -> jax.Array:
    teacher = _kl_term(log_t, log_s, 1 - beta)
    return beta * teacher + (1 - beta) * _kl_term(log_s, log_t, beta)
