"""Compares losses and gradients with PyTorch's own functions (slow; needs torch)."""

import jax
import numpy as np
import pytest
from test_losses import assert_near

from opsd_jax import losses

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def logits():
    return np.random.default_rng(0).normal(0, 3, (2, 3, 5, 17)).astype(np.float32)


def torch_gradient(loss, logits):
    x = torch.tensor(logits, requires_grad=True)
    value = loss(x)
    value.sum().backward()
    return value.detach().numpy(), x.grad.numpy()


def check(ours, theirs, logits):
    """Compares the values of all tokens, and the gradient of the sum of the values."""
    value, gradient = torch_gradient(theirs, logits[0])
    assert_near(ours(logits[0]), value)
    assert_near(jax.grad(lambda x: ours(x).sum())(logits[0]), gradient)


def divergence_by_torch(student, teacher, beta, temperature):
    """Computes the generalised JSD from kl_div, as distillation trainers on PyTorch do."""
    log_s, log_t = (torch.log_softmax(x / temperature, dim=-1) for x in (student, teacher))
    kl = lambda p, q: torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    if beta in (0, 1):
        return kl(log_t, log_s) if beta == 0 else kl(log_s, log_t)
    mixture = torch.logaddexp(log_s + np.log(1 - beta), log_t + np.log(beta))
    return beta * kl(log_t, mixture) + (1 - beta) * kl(log_s, mixture)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_generalised_jsd(logits, beta, temperature):
    teacher = torch.tensor(logits[1])
    ours = lambda x: losses.jsd(
        student_logits=x, teacher_logits=logits[1], beta=beta, temperature=temperature
    )
    check(ours, lambda x: divergence_by_torch(x, teacher, beta, temperature), logits)


def test_cross_entropy(logits):
    tokens = np.random.default_rng(1).integers(0, 17, (3, 5))

    def theirs(x):
        return torch.nn.functional.cross_entropy(
            x.movedim(-1, 1), torch.tensor(tokens), reduction="none"
        )

    check(lambda x: -losses.token_logprobs(x, tokens), theirs, logits)


def test_entropy(logits):
    theirs = lambda x: torch.distributions.Categorical(logits=x).entropy()
    check(losses.entropy, theirs, logits)


def test_top_k_with_a_bucket(logits):
    """Compares with gathered log-probabilities and a bucket from expm1."""

    def theirs(student, k=4):
        log_s, log_t = (torch.log_softmax(x, -1) for x in (student, torch.tensor(logits[1])))
        entries = torch.topk(log_s, k).indices
        sides = []
        for log_p in (log_s, log_t):
            chosen = log_p.gather(-1, entries)
            covered = torch.logsumexp(chosen, -1, keepdim=True).clamp(max=-1e-7)
            sides.append(torch.cat([chosen, torch.log(-torch.expm1(covered))], -1))
        return (sides[0].exp() * (sides[0] - sides[1])).sum(-1)

    def ours(student):
        s, t = losses.top_k(
            student_logits=student, teacher_logits=logits[1], k=4, support="student"
        )
        return losses.reverse_kl(student_logits=s, teacher_logits=t)

    check(ours, theirs, logits)


def test_grpo_on_torch(logits):
    """Compares with ratio, clip, k3 and sequence mean as trainers on PyTorch write them."""
    rng = np.random.default_rng(2)
    tokens = rng.integers(0, 17, (3, 5))
    mask = np.arange(5) < np.array([5, 2, 3])[:, None]
    old, reference = -rng.uniform(1, 4, (2, 3, 5)).astype(np.float32)
    advantages = np.array([1.0, -1.0, 0.5], np.float32)

    def theirs(x):
        logp = torch.log_softmax(x, -1).gather(-1, torch.tensor(tokens)[..., None])[..., 0]
        a, m = torch.tensor(advantages)[:, None], torch.tensor(mask)
        ratio = torch.exp(logp - torch.tensor(old))
        loss = -torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a)
        gap = torch.tensor(reference) - logp
        loss = loss + 0.04 * (torch.exp(gap) - gap - 1)
        return ((loss * m).sum(1) / m.sum(1)).mean()

    def ours(x):
        return losses.policy_gradient(
            student=x,
            tokens=tokens,
            mask=mask,
            advantages=advantages,
            behaviour_logprobs=old,
            reference_logprobs=reference,
            options=losses.PRESETS["grpo"],
        ).mean

    check(ours, theirs, logits)
