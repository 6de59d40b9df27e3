"""The losses in float64 NumPy, one token at a time, written from their equations.

Some losses hold a quantity fixed in their gradient. That quantity is computed from `frozen` logits
here. A difference quotient in `student` then has the derivative that the loss must have.
"""

import numpy as np


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def kl(p, q):
    """Computes KL(p || q) of probabilities [V]."""
    possible = p > 0
    return float((p[possible] * (np.log(p[possible]) - np.log(q[possible]))).sum())


def divergence(name, s, t, *, beta=0.5, alpha=0.5):
    """Computes a divergence of probabilities s (student) and t (teacher), [V] each."""
    if name == "reverse_kl" or (name == "jsd" and beta == 1):
        return kl(s, t)
    if name == "forward_kl" or (name == "jsd" and beta == 0):
        return kl(t, s)
    if name == "skewed_kl":
        return kl(s, alpha * t + (1 - alpha) * s)
    mixture = beta * t + (1 - beta) * s
    return beta * kl(t, mixture) + (1 - beta) * kl(s, mixture)


def supported(s, t, chosen, rest):
    """Restricts probabilities to the chosen vocabulary entries, with a bucket or renormalised."""
    if rest == "renormalise":
        return s[chosen] / s[chosen].sum(), t[chosen] / t[chosen].sum()
    bucket = lambda p: np.append(p[chosen], max(1 - p[chosen].sum(), 1e-7))
    return bucket(s), bucket(t)


def chosen_entries(s, t, k, support):
    most_likely = lambda p: set(np.argsort(-p, kind="stable")[:k].tolist())
    return sorted(
        {
            "teacher": most_likely(t),
            "student": most_likely(s),
            "union": most_likely(s) | most_likely(t),
        }[support]
    )


def position(kind, i, n, o):
    return {
        "uniform": 1.0,
        "linear": 1 + (o.late - 1) * i / max(n - 1, 1),
        "exponential": np.exp(o.rate * i / max(n - 1, 1)),
        "sigmoid": o.floor + (1 - o.floor) / (1 + np.exp(-(i / n - o.centre) / o.width)),
    }[kind]


def row_scale(o, tokens):
    """Returns a row's divisor, and what it adds to the normaliser for a row weight of 1."""
    return {
        "sequence": (len(tokens), 1),
        "token": (1, len(tokens)),
        "fixed": (o.length, 1),
    }[o.aggregation]


def opsd(
    student,
    teacher,
    mask,
    outcomes,
    tokens,
    behaviour,
    o,
    temperature=1.0,
    frozen=None,
    row_weight=1,
):
    """Computes (sum, weight) of `losses.opsd`."""
    frozen = student if frozen is None else frozen
    total = normaliser = 0.0
    for b in range(len(mask)):
        outcome = [i for i in range(3) if outcomes[i][b]]
        weight = o.gate[outcome[0]] * row_weight if outcome else 0.0
        end = o.first_only or None
        counted = np.flatnonzero(mask[b])[o.skip_first : end]
        if not weight or not len(counted):
            continue
        divisor, units = row_scale(o, counted)
        normaliser += weight * units
        w = np.array([position(o.position, i, len(counted), o) for i in range(len(counted))])
        for factor, at in zip(w / w.mean(), counted, strict=True):
            y = tokens[b, at]
            log_s, log_t, log_f = (
                log_softmax(x[b, at].astype(np.float64) / temperature)
                for x in (student, teacher, frozen)
            )
            name = o.divergences[outcome[0]]
            if name == "sampled_kl":
                advantage = log_t[y] - log_f[y]
                if o.control_variate:
                    advantage += kl(np.exp(log_f), np.exp(log_t))
                value = log_f[y] - log_t[y] - advantage * (log_s[y] - log_f[y])
                fixed = log_f[y] - log_t[y]
            else:
                s, t, f = np.exp(log_s), np.exp(log_t), np.exp(log_f)
                compare = lambda s, t, name=name: divergence(name, s, t, beta=o.beta, alpha=o.alpha)
                if o.top_k:
                    chosen = chosen_entries(f, t, o.top_k, o.support)
                    value = compare(*supported(s, t, chosen, o.rest))
                    fixed = compare(*supported(f, t, chosen, o.rest))
                else:
                    value, fixed = compare(s, t), compare(f, t)
            if o.clip:
                value *= min(1.0, o.clip / max(abs(fixed), 1e-30))
            if o.importance_cap:
                value *= min(np.exp(log_f[y] - behaviour[b, at]), o.importance_cap)
            total += weight * factor * value / divisor
    return total, normaliser


def policy_gradient(
    student, mask, tokens, advantages, behaviour, old, reference, o, temperature=1.0, frozen=None
):
    """Computes (sum, weight) of `losses.policy_gradient`, with advantages [B]."""
    frozen = student if frozen is None else frozen
    total = normaliser = 0.0
    start = behaviour if old is None else old
    for b in range(len(mask)):
        counted = np.flatnonzero(mask[b])
        if not len(counted):
            continue
        divisor, units = row_scale(o, counted)
        normaliser += units
        of = lambda x, b=b, counted=counted: np.array(
            [log_softmax(x[b, t].astype(np.float64) / temperature)[tokens[b, t]] for t in counted]
        )
        logp, fixed = of(student), of(frozen)
        ratio, fixed_ratio = (np.exp(x - start[b, counted]) for x in (logp, fixed))
        if o.ratio == "sequence":
            ratio, fixed_ratio = (
                np.full(len(x), np.exp(np.mean(np.log(x)))) for x in (ratio, fixed_ratio)
            )
        A, low, high = advantages[b], 1 - o.clip_low, 1 + o.clip_high
        values = {
            "ppo": -np.minimum(ratio * A, np.clip(ratio, low, high) * A),
            "cispo": -np.clip(fixed_ratio, low, high) * A * logp,
            "none": -ratio * A,
        }[o.clip]
        if o.dual_clip and A < 0:
            values = np.minimum(values, -o.dual_clip * A)
        if old is not None and o.importance_cap:
            values *= np.minimum(np.exp(old - behaviour)[b, counted], o.importance_cap)
        if reference is not None:
            gap = reference[b, counted] - logp
            values += o.kl_coefficient * (np.exp(gap) - 1 - gap)
        total += values.sum() / divisor
    return total, normaliser


def gradient(f, x, h=1e-5):
    """Computes the central difference quotient of f(x)[0] in float64; its error is about 1e-9."""
    x = np.asarray(x, np.float64)
    out = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[i] += h
        down[i] -= h
        out[i] = (f(up)[0] - f(down)[0]) / (2 * h)
    return out
