"""Per-token divergences between a student distribution S and a teacher distribution T.

With a = log S(v) and b = log T(v), each divergence is a sum over the vocabulary entries v of

    kl_term(x, y, w) = e^x (x - log((1 - w) e^x + w e^y)),

which is the contribution of one entry to KL(X || (1 - w) X + w Y). With w = 1 it is KL(X || Y).

| function | equation | terms |
|---|---|---|
| `reverse_kl` | KL(S \\|\\| T) | kl_term(a, b, 1) |
| `forward_kl` | KL(T \\|\\| S) | kl_term(b, a, 1) |
| `jsd` | beta KL(T \\|\\| M) + (1 - beta) KL(S \\|\\| M), M = beta T + (1 - beta) S | both, mixed |
| `skewed_kl` | KL(S \\|\\| alpha T + (1 - alpha) S) | kl_term(a, b, alpha) |

All of them have these properties:

- Equal logits give exactly 0.
- An entry with logit -inf on the side of x adds 0 to the value and to the gradients.
- If only the side of y has -inf, `reverse_kl` and `forward_kl` are +inf by their definition. `jsd`
  and `skewed_kl` are finite.
- A NaN logit gives NaN.
- Gradients flow to both sides, in reverse mode only. Use `jax.lax.stop_gradient` on the teacher.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from opsd_jax.losses.checks import OneOf, Range, is_known, number
from opsd_jax.losses.likelihood import at_temperature, k3, log_normaliser, token_logprobs

# (log S(v), log T(v)) -> the contribution of the vocabulary entry v to the divergence. The
# weight of a mixture, if there is one, is the first argument.
Term = Callable[..., jax.Array]


def reverse_kl(
    *, student_logits: jax.Array, teacher_logits: jax.Array, temperature: float = 1.0
) -> jax.Array:
    """Computes the reverse KL divergence, KL(student || teacher), for each token.

    It is sum_v S(v) (log S(v) - log T(v)). This divergence is mode-seeking: the student avoids what
    the teacher finds unlikely.

    Args:
      student_logits: [..., V].
      teacher_logits: [..., V], over the same vocabulary.
      temperature: divides the logits of both sides; above 0. The result is not multiplied by its
        square, which Hinton et al. (arXiv 1503.02531) do.

    Returns:
      float32 [...], in nats.

    Raises:
      ValueError: the shapes of the logits differ, or `temperature` is not above 0.

    Reference: OPSD (arXiv 2605.06188), eq. 1.
    """
    return _divergence(_reverse, student_logits, teacher_logits, temperature)


def forward_kl(
    *, student_logits: jax.Array, teacher_logits: jax.Array, temperature: float = 1.0
) -> jax.Array:
    """Computes the forward KL divergence, KL(teacher || student), for each token.

    It is sum_v T(v) (log T(v) - log S(v)). This divergence is mode-covering: the student covers
    everything that the teacher finds likely.

    Args:
      student_logits: [..., V].
      teacher_logits: [..., V], over the same vocabulary.
      temperature: divides the logits of both sides; above 0.

    Returns:
      float32 [...], in nats.

    Raises:
      ValueError: the shapes of the logits differ, or `temperature` is not above 0.
    """
    return _divergence(_forward, student_logits, teacher_logits, temperature)


def jsd(
    *,
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    temperature: float = 1.0,
    beta: float = 0.5,
) -> jax.Array:
    """Computes the generalised Jensen-Shannon divergence for each token.

    It is beta KL(T || M) + (1 - beta) KL(S || M) with the mixture M = beta T + (1 - beta) S.

    At the ends the formula would be 0. As in TRL and Liger, beta = 0 is defined as the forward KL
    and beta = 1 as the reverse KL instead. These are the limits of the formula divided by beta and
    by 1 - beta, so the result jumps at both ends.

    Args:
      student_logits: [..., V].
      teacher_logits: [..., V], over the same vocabulary.
      temperature: divides the logits of both sides; above 0.
      beta: weight of the teacher in the mixture, in [0, 1]; above 0 and below 1 if it is traced.

    Returns:
      float32 [...], in nats.

    Raises:
      ValueError: the shapes of the logits differ, or `temperature` or `beta` is out of range.

    Reference: GKD (arXiv 2306.13649), eq. 1.
    """
    Range(0, 1).check("beta", beta)
    beta = number(beta)
    if is_known(beta) and beta in (0, 1):
        end = _forward if beta == 0 else _reverse
        return _divergence(end, student_logits, teacher_logits, temperature)
    return _divergence(_jensen_shannon, student_logits, teacher_logits, temperature, beta)


def skewed_kl(
    *,
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    temperature: float = 1.0,
    alpha: float = 0.5,
) -> jax.Array:
    """Computes the KL divergence of the student from a mixture of the teacher and the student.

    It is KL(S || alpha T + (1 - alpha) S), a reverse KL to a target near the student. The value is
    at most -log(1 - alpha), and alpha = 1 gives the reverse KL. The gradient also flows through S
    in the target.

    Args:
      student_logits: [..., V].
      teacher_logits: [..., V], over the same vocabulary.
      temperature: divides the logits of both sides; above 0.
      alpha: weight of the teacher in the target, above 0 and at most 1; below 1 if it is traced.

    Returns:
      float32 [...], in nats.

    Raises:
      ValueError: the shapes of the logits differ, or `temperature` or `alpha` is out of range.

    Reference: the skewed reverse KL of DistiLLM (arXiv 2402.03898). TROPD uses it as a trust
    region, with the reward log(alpha T + (1 - alpha) S) - log S.
    """
    Range(1e-6, 1).check("alpha", alpha)
    return _divergence(_skewed, student_logits, teacher_logits, temperature, number(alpha))


def sampled_kl(
    *,
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    tokens: jax.Array,
    temperature: float = 1.0,
    control_variate: bool = False,
) -> jax.Array:
    """Estimates the reverse KL divergence, KL(student || teacher), at each sampled token.

    The value for a sampled token y is log S(y) - log T(y), the estimate k1 of `kl_estimates`. It is
    unbiased if y is sampled from S, and it can be negative. The derivative of this value would not
    depend on the teacher. The gradient is therefore defined as -A d log S(y), with the advantage
    A = log T(y) - log S(y) held fixed, which is an unbiased estimate of the gradient of KL(S || T).

    Args:
      student_logits: [..., V].
      teacher_logits: [..., V], over the same vocabulary.
      tokens: int [...], sampled from the student at this temperature without top-k or top-p.
      temperature: divides the logits of both sides; above 0.
      control_variate: whether to add KL(S || T) to A (vOPD, arXiv 2605.07865). A then has a mean of
        0, which reduces the variance and does not change the expectation.

    Returns:
      float32 [...], in nats.

    Raises:
      ValueError: the shapes of the arguments do not match, or `temperature` is not above 0.

    Reference: OPSD (arXiv 2605.06188), eq. 3. SDPO, Tinker and verl use the same form.
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


# The divergences that `OPSD.divergence` can name. To add one, write its function and add a line
# here, or, from your own code, `losses.DIVERGENCES["name"] = function`. The signature is
#
#     function(*, student_logits, teacher_logits) -> float32 [...]
#
# with float32 logits [..., V] of any leading shape, and one result for each token. The logits are
# already divided by the temperature. With `top_k` they are log-probabilities of the chosen entries
# instead. The function may have more parameters: `tokens` receives the response tokens, int [...],
# and a parameter with the name of a field of `OPSD`, such as `beta`, receives that option.
DIVERGENCES: dict[str, Callable[..., jax.Array]] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "jsd": jsd,
    "skewed_kl": skewed_kl,
    "sampled_kl": sampled_kl,
}


def kl_estimates(
    *, student_logprobs: jax.Array, teacher_logprobs: jax.Array
) -> dict[str, jax.Array]:
    """Computes three estimates (k1, k2, k3) of KL(student || teacher) from sampled tokens.

    Args:
      student_logprobs: log S(y) of the sampled tokens, of any shape, in nats.
      teacher_logprobs: log T(y) of the same tokens.

    Returns:
      Three estimates of the shape of the arguments, with d = log S(y) - log T(y). "k1" is d and
      unbiased. "k2" is d^2 / 2, biased and with less variance. "k3" is e^-d - 1 + d, unbiased and
      never negative; in it d is clipped to [-20, 20] to prevent overflow.

    Reference: Schulman, "Approximating KL divergence" (2020).
    """
    d = student_logprobs - teacher_logprobs
    return {"k1": d, "k2": d * d / 2, "k3": k3(-d)}


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
    """Restricts the student and teacher distributions to the k most likely vocabulary entries.

    The k entries are the most likely ones of the student, of the teacher, or of both.

    The results can be passed as logits to the divergences of this module. If you use a temperature,
    divide the logits by it before this function.

    With `rest="bucket"`, a divergence of the results is never negative and is a lower bound of the
    divergence over the whole vocabulary (by the data-processing inequality). With
    `rest="renormalise"` it is not a bound, and with the student's support its gradient is biased.

    Args:
      student_logits: [..., V].
      teacher_logits: [..., V], over the same vocabulary.
      k: number of entries, at least 1.
      support: which entries are kept: the k most likely entries of the "teacher", of the "student",
        or the "union" of both.
      rest: what happens to the probability of the other entries. "bucket": it becomes one
        additional entry (SDPO). "renormalise": the kept probabilities are scaled to a sum of 1
        (siyan-zhao/OPSD, Tinker).

    Returns:
      `(student, teacher)`: float32 log-probabilities [..., K] over the same entries. K is k, or 2 k
      for the union, and one more with a bucket. In a union, the second copy of an entry that both
      sides have is -inf, and so is the bucket if the K entries are the whole vocabulary.

    Raises:
      ValueError: the shapes of the logits differ, `k` is below 1, or an option is unknown.
    """
    _check_same_vocabulary(student_logits, teacher_logits)
    OneOf(SUPPORTS).check("support", support)
    OneOf(RESTS).check("rest", rest)
    if k < 1:
        raise ValueError(f"k is {k}; expected at least 1.")
    k = min(k, student_logits.shape[-1])
    student_logits, teacher_logits = (
        at_temperature(student_logits, 1),
        at_temperature(teacher_logits, 1),
    )
    entries, repeated = _support(support, student_logits, teacher_logits, k)
    return (
        _restricted(student_logits, entries, repeated, rest),
        _restricted(teacher_logits, entries, repeated, rest),
    )


def _support(support: str, student_logits, teacher_logits, k: int) -> tuple[jax.Array, jax.Array]:
    """Returns the indices of the entries that `top_k` compares, and a mask of repeated ones.

    With support "union", entries of the student that the teacher has too are repeated.
    """

    def most_likely(logits):
        return jax.lax.top_k(jax.lax.stop_gradient(logits), k)[1]

    if support == "union":
        first, second = most_likely(teacher_logits), most_likely(student_logits)
        entries = jnp.concatenate([first, second], axis=-1)
        again = (second[..., :, None] == first[..., None, :]).any(axis=-1)
        return entries, jnp.concatenate([jnp.zeros_like(again), again], axis=-1)
    entries = most_likely(teacher_logits if support == "teacher" else student_logits)
    return entries, jnp.zeros(entries.shape, bool)


def _restricted(logits, entries, repeated, rest: str) -> jax.Array:
    """Returns the log-probabilities of the vocabulary entries with the indices `entries`.

    With `rest="bucket"`, one more entry has the total probability of all other entries.
    """
    total = log_normaliser(logits)[..., None]
    chosen = jnp.where(repeated, -jnp.inf, jnp.take_along_axis(logits, entries, axis=-1) - total)
    if rest == "renormalise":
        return chosen - log_normaliser(chosen)[..., None]
    # 1 minus the chosen probabilities would lose all digits where they sum to nearly 1.
    others = jnp.put_along_axis(logits, entries, -jnp.inf, axis=-1, inplace=False)
    bucket = log_normaliser(others)[..., None] - total
    return jnp.concatenate([chosen, bucket], axis=-1)


def _check_same_vocabulary(student_logits: Any, teacher_logits: Any) -> None:
    if jnp.shape(student_logits) != jnp.shape(teacher_logits):
        raise ValueError(
            f"student_logits has shape {list(jnp.shape(student_logits))} and teacher_logits has "
            f"shape {list(jnp.shape(teacher_logits))}; expected equal shapes. If one vocabulary is "
            "padded, pad the other logits with -inf."
        )


def _divergence(
    term: Term, student_logits, teacher_logits, temperature, *weights: Any
) -> jax.Array:
    """Computes the sum of `term` over the vocabulary, after checking the logits and temperature."""
    _check_same_vocabulary(student_logits, teacher_logits)
    if all(map(is_known, weights)):  # then the term can depend on their values
        term, weights = functools.partial(term, *weights), ()
    return _sum_of_terms(
        term,
        weights,
        at_temperature(student_logits, temperature),
        at_temperature(teacher_logits, temperature),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_of_terms(
    term: Term, weights: Any, student_logits: jax.Array, teacher_logits: jax.Array
) -> jax.Array:
    """Computes sum_v term(*weights, log S(v), log T(v)). S and T are the softmaxes of the logits.

    Logits are float32 [..., V], and the result is float32 [...]. Traced weights are an argument,
    without a gradient, because a function with a `custom_vjp` cannot close over them. The backward
    pass recomputes the softmaxes and the terms from the logits. With a vocabulary of 151,936
    entries, storing another array [..., V] costs more than computing it again.
    """
    return _sum_of_terms_fwd(term, weights, student_logits, teacher_logits)[0]


def _sum_of_terms_fwd(term, weights, student_logits, teacher_logits):
    totals = log_normaliser(student_logits), log_normaliser(teacher_logits)
    log_s, log_t = student_logits - totals[0][..., None], teacher_logits - totals[1][..., None]
    value = jnp.sum(term(*weights, log_s, log_t), axis=-1)
    return value, (weights, student_logits, teacher_logits, totals, value)


def _sum_of_terms_bwd(term, residuals, cotangent):
    weights, student_logits, teacher_logits, totals, value = residuals
    term = functools.partial(term, *weights)

    def slope_and_probability(totals, side):
        """Returns `(d term / d log S, S)` if `side` is 0, or `(d term / d log T, T)` if it is 1."""
        log_s, log_t = student_logits - totals[0][..., None], teacher_logits - totals[1][..., None]
        tangents = [
            jnp.ones_like(x) if i == side else jnp.zeros_like(x)
            for i, x in enumerate((log_s, log_t))
        ]
        return jax.jvp(term, (log_s, log_t), tuple(tangents))[1], jnp.exp((log_s, log_t)[side])

    gradients = []
    # Adding 0 times the result of the previous pass over the vocabulary orders the four passes.
    # Without that, XLA runs them together, or stores an array for two of them, and needs five
    # arrays [..., V] at a time instead of three. XLA cannot drop the product, because 0 times NaN
    # or infinity is NaN. An `optimization_barrier` would order the passes too, but it would change
    # the gradients of an infinite divergence, which are NaN in every entry.
    after = 0 * value
    for side in (0, 1):
        totals = tuple(n + after for n in totals)
        total = jnp.sum(slope_and_probability(totals, side)[0], axis=-1)
        after = 0 * total
        totals = tuple(n + after for n in totals)
        slope, probability = slope_and_probability(totals, side)
        gradients.append(cotangent[..., None] * (slope - probability * total[..., None]))
    return None, *gradients


_sum_of_terms.defvjp(_sum_of_terms_fwd, _sum_of_terms_bwd)


def _kl_term(x: jax.Array, y: jax.Array, weight: float) -> jax.Array:
    """Computes e^x (x - log((1 - weight) e^x + weight e^y)). The result is 0 where e^x is 0."""
    possible = jnp.exp(x) != 0  # `> 0` would hide a NaN
    # The inputs are replaced too: in the branch that `where` does not take, 0 * inf would still
    # make the gradients NaN.
    x, y = jnp.where(possible, x, 0.0), jnp.where(possible, y, 0.0)
    gap = x - y if is_known(weight) and weight == 1 else -_log_mix(y - x, weight)
    return jnp.where(possible, jnp.exp(x) * gap, 0.0)


def _log_mix(d: jax.Array, weight: float) -> jax.Array:
    """Computes log((1 - weight) + weight e^d) without overflow. Returns exactly 0 at d = 0."""
    positive = d > 0
    above, below = jnp.where(positive, d, 0.0), jnp.where(positive, 0.0, d)
    return jnp.where(
        positive,
        above + jnp.log1p((1 - weight) * jnp.expm1(-above)),
        jnp.log1p(weight * jnp.expm1(below)),
    )


def _reverse(log_s: jax.Array, log_t: jax.Array) -> jax.Array:
    """Returns each vocabulary entry's contribution to the reverse KL divergence, KL(S || T)."""
    return _kl_term(log_s, log_t, 1.0)


def _forward(log_s: jax.Array, log_t: jax.Array) -> jax.Array:
    """Returns each vocabulary entry's contribution to the forward KL divergence, KL(T || S)."""
    return _kl_term(log_t, log_s, 1.0)


def _skewed(alpha: float, log_s: jax.Array, log_t: jax.Array) -> jax.Array:
    """Returns each vocabulary entry's contribution to KL(S || alpha T + (1 - alpha) S)."""
    return _kl_term(log_s, log_t, alpha)


def _jensen_shannon(beta: float, log_s: jax.Array, log_t: jax.Array) -> jax.Array:
    """Returns each vocabulary entry's contribution to the generalised Jensen-Shannon divergence."""
    teacher = _kl_term(log_t, log_s, 1 - beta)
    return beta * teacher + (1 - beta) * _kl_term(log_s, log_t, beta)
