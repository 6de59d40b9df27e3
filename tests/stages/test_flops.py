"""The model FLOPs of an update, against XLA's count and a count by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_config

from opsd_jax.models import decoder
from opsd_jax.stages import batch, flops


def test_a_forward_pass_has_the_operations_that_xla_counts():
    """XLA counts norms and softmax too, and computes attention between all pairs of tokens."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_layers": 1, "num_heads": 8}
    config = tiny_config.decoder(
        **sizes, vocab_size=512, num_kv_heads=2, head_dim=32, scan_unroll=1
    )
    model, n = decoder.from_config(config), 64
    tokens = jnp.zeros((1, n), jnp.int32)

    def logits(params):
        return model.policy.unembed(params, model.policy.forward(params, tokens, tokens)[0])

    params = jax.eval_shape(model.init, jax.random.key(0))
    counted = jax.jit(logits).lower(params).compile().cost_analysis()["flops"]
    assert model.flops(n, n * n, n) == pytest.approx(counted, rel=0.02)


def test_an_update_counts_tokens_and_no_padding(model):
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(1, 9, n).tolist()
    rows = [
        {"student": draw(a), "teacher": draw(a + b), "response": draw(c)}
        for a, b, c in [(3, 4, 5), (2, 2, 1), (6, 1, 9)]
    ]
    packed = batch.pack(
        rows,
        buckets=[{"student": 16, "teacher": 16}],
        microbatch=2,
        capacity=8,
        pad_id=0,
    )
    count = flops.of_update(model, {"student": flops.TRAINED, "teacher": 1})

    by_hand = 0
    for row in rows:
        predicted = len(row["response"])
        for name, passes in (("student", 3), ("teacher", 1)):
            n = len(row[name]) + predicted - 1
            pairs = sum(range(1, n + 1))
            by_hand += passes * model.flops(n, pairs, predicted)
    assert count(packed) == pytest.approx(by_hand, rel=1e-12)
    assert flops.of_update(model._replace(flops=None), {"student": 3}) is None
