"""A decoder with small pages, and attention over them in plain JAX instead of the TPU kernel."""

from unittest import mock

import jax.numpy as jnp

from opsd_jax.config import loading
from opsd_jax.models import attention, decoder, paged

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_layers": 2, "scan_unroll": 1}
HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 128}


def attend(q_Bx1xHxC, cache, positions_Bx1, *, window=None, scale=None):
    k_BxKxCxS, v_BxKxSxC = paged.dense(cache, q_Bx1xHxC.dtype)
    mask = attention.mask(jnp.arange(k_BxKxCxS.shape[-1])[None], positions_Bx1, window)
    return attention.dense(q_Bx1xHxC, k_BxKxCxS, v_BxKxSxC, mask, scale)


def small_pages(tokens=4):
    """Returns a context manager, in which a page has `tokens` tokens and no kernel is used."""
    return mock.patch.multiple(paged, PAGE=tokens, attend=attend)


def model(cache="paged"):
    section = loading.read("quickstart").model.copy_and_resolve_references()
    section.update({**SIZES, **HEADS, "cache": cache, "attention": "dense"})
    return decoder.from_config(section)
