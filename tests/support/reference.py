"""The losses in float64 NumPy, one token at a time, written from their equations.

Where a loss holds a quantity fixed in its gradient, `frozen` logits give that quantity, so that a
difference quotient in `student` has the derivative that the loss is to have.
"""

import numpy as np


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def kl(p, q):
    """KL(p || q) of probabilities [V]."""
    there = p > 0
    return float((p[there] * (np.log(p[there]) - np.log(q[there]))).sum())


def divergence(name, s, t, *, beta=0.5, alpha=0.5):
    """Of probabilities s (student) and t (teacher), [V]."""
    if name == "reverse_kl" or (name == "jsd" and beta == 1):
        return kl(s, t)
    if name == "forward_kl" or (name == "jsd" and beta == 0):
        return kl(t, s)
    if name == "skewed_kl":
        return kl(s, alpha * t + (1 - alpha) * s)
    mixture = beta * t + (1 - beta) * s
    return beta * kl(t, mixture) + (1 - beta) * kl(s, mixture)


def supported(s, t, chosen, rest):
    """Probabilities over the chosen words, and a bucket with the others."""
    if rest == "renormalise":
        return s[chosen] / s[chosen].sum(), t[chosen] / t[chosen].sum()
    bucket = lambda p: np.append(p[chosen], max(1 - p[chosen].sum(), 1e-7))
    return bucket(s), bucket(t)


def chosen_words(s, t, k, support):
    likeliest = lambda p: set(np.argsort(-p, kind="stable")[:k].tolist())
    return sorted(
        {
            "teacher": likeliest(t),
            "student": likeliest(s),
            "union": likeliest(s) | likeliest(t),
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
    """(divisor of a row's tokens, what the row adds to the normaliser for each unit of weight)."""
    return {
        "sequence": (len(tokens), 1),
        "token": (1, len(tokens)),
        "fixed": (o.length, 1),
    }[o.aggregation]


def opsd(
    student, teacher, mask, groups, tokens, behaviour, o, temperature=1.0, frozen=None, row_weight=1
):
    """(sum, weight) of `losses.opsd`."""
    frozen = student if frozen is None else frozen
    total = normaliser = 0.0
    for b in range(len(mask)):
        group = [g for g in range(3) if groups[g][b]]
        weight = o.gate[group[0]] * row_weight if group else 0.0
        end = o.first_only or None
        counted = np.flatnonzero(mask[b])[o.skip_first : end]
        if not weight or not len(counted):
            continue
        divisor, units = row_scale(o, counted)
        normaliser += weight * units
        w = np.array([position(o.position, i, len(counted), o) for i in range(len(counted))])
        for share, at in zip(w / w.mean(), counted, strict=True):
            y = tokens[b, at]
            log_s, log_t, log_f = (
                log_softmax(x[b, at].astype(np.float64) / temperature)
                for x in (student, teacher, frozen)
            )
            name = o.divergences[group[0]]
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
                    chosen = chosen_words(f, t, o.top_k, o.support)
                    value = compare(*supported(s, t, chosen, o.rest))
                    fixed = compare(*supported(f, t, chosen, o.rest))
                else:
                    value, fixed = compare(s, t), compare(f, t)
            if o.clip:
                value *= min(1.0, o.clip / max(abs(fixed), 1e-30))
            if o.importance_cap:
                value *= min(np.exp(log_f[y] - behaviour[b, at]), o.importance_cap)
            total += weight * share * value / divisor
    return total, normaliser


def policy_gradient(
    student, mask, tokens, advantages, behaviour, old, reference, o, temperature=1.0, frozen=None
):
    """(sum, weight) of `losses.policy_gradient`; advantages [B]."""
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
    """The central difference quotient of f(x)[0] in float64: exact to some 1e-9 here."""
    x = np.asarray(x, np.float64)
    out = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[i] += h
        down[i] -= h
        out[i] = (f(up)[0] - f(down)[0]) / (2 * h)
    return out
