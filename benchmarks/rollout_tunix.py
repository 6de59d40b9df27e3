"""Tunix's sampler as an engine of benchmarks/rollout.py, which runs this script."""

import functools
from types import SimpleNamespace

import jax
import rollout_protocol
from flax import nnx
from tunix.generate import sampler
from tunix.models.qwen3 import model

NONE = -1  # not a token id: no prompt is padded, and no response ends early
TOKENIZER = SimpleNamespace(  # the prompts are token ids already
    encode=lambda ids: ids,
    decode=lambda ids: "",
    bos_id=lambda: None,
    eos_id=lambda: NONE,
    pad_id=lambda: NONE,
)


def transformer(vocabulary: int) -> model.Qwen3:
    """Returns Qwen3 in float32 with normally distributed weights.

    Tunix initialises the weights of the MLPs to zero, so they are replaced.
    """
    m = rollout_protocol.MODEL
    config = model.ModelConfig(
        vocab_size=vocabulary,
        num_layers=m["layers"],
        embed_dim=m["hidden"],
        hidden_dim=m["mlp"],
        num_heads=m["heads"],
        num_kv_heads=m["kv_heads"],
        head_dim=m["head_dim"],
        rope_theta=m["rope_theta"],
        norm_eps=1e-6,
    )
    qwen3 = model.Qwen3(config, rngs=nnx.Rngs(0))
    random = lambda w: w if w.ndim == 1 else 0.02 * jax.random.normal(jax.random.key(0), w.shape)
    nnx.update(qwen3, jax.tree.map(random, nnx.state(qwen3)))
    return qwen3


def engine(vocabulary: int, lengths: list[int]):
    """Samples static batches, each with a program and a cache of exactly its longest length."""
    qwen3 = transformer(vocabulary)
    m = rollout_protocol.MODEL

    @functools.cache
    def sample(tokens: int):
        size = rollout_protocol.PROMPT + tokens
        cache = sampler.CacheConfig(size, m["layers"], m["kv_heads"], m["head_dim"])
        return functools.partial(
            sampler.Sampler(qwen3, TOKENIZER, cache),
            max_generation_steps=tokens,
            max_prompt_length=rollout_protocol.PROMPT,
            temperature=1.0,
            top_p=1.0,
        )

    requests = rollout_protocol.batches(vocabulary, lengths)

    def run():
        sampled = (sample(longest)(prompts).tokens for prompts, longest in requests)
        return {"tokens": [len(tokens) for batch in sampled for tokens in batch]}

    return run


if __name__ == "__main__":
    rollout_protocol.serve(engine)
