"""A user's own model as a plain dict of arrays. It predicts a token from the previous one only."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from opsd_jax.policy import Model, Policy


def forward(params, tokens, positions, cache=None):
    return jnp.tanh(params["table"][tokens]), cache


def unembed(params, hidden):
    return hidden @ params["out"]


def init_cache(batch, length):
    return jnp.zeros((batch, 1))  # the model has no state


def make(config):
    def init(key):
        table, out = jax.random.normal(key, (2, config.vocab_size, config.hidden_size))
        return {"table": table, "out": out.T * 0.1}

    rules = ((r"table", P(None, "tensor")), (r"out", P("tensor", None)))
    return Model(Policy(forward, unembed, init_cache), init, rules, config.vocab_size)
