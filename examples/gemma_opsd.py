"""Trains Gemma, as implemented in Google DeepMind's package gemma, with OPSD.

    pip install gemma && pip install --no-deps . && python examples/gemma_opsd.py

The sizes are tiny; `gm.nn.Gemma3_1B()` and its checkpoint go in their place. The teacher is a copy
of the parameters that sees a hint before the question.
"""

import jax
import jax.numpy as jnp
import optax
from gemma.gm.nn._config import TransformerConfig
from gemma.gm.nn._modules import AttentionType
from gemma.gm.nn._transformer import Transformer

from opsd_jax import losses

VOCAB, CAP, QUESTION, HINT, RESPONSE = 64, 30.0, 6, 4, 10
MODEL = Transformer(
    config=TransformerConfig(
        num_embed=VOCAB, embed_dim=32, hidden_dim=64, num_heads=4, head_dim=8, num_kv_heads=2,
        final_logit_softcap=CAP, use_post_attn_norm=True, use_post_ffw_norm=True,
        attention_types=(AttentionType.LOCAL_SLIDING, AttentionType.GLOBAL),
        sliding_window_size=8, use_qk_norm=True,
    ),
    tokens="tokens", dtype=jnp.float32,
)  # fmt: skip
OPTIMIZER = optax.adam(3e-3)


def unembed(params: dict, hidden: jax.Array) -> jax.Array:
    """Returns the logits [n, V] of hidden states [n, D]. Without a soft cap, return `logits`."""
    table = params["embedder"]["input_embedding"].astype(hidden.dtype)
    logits = jnp.einsum("nd,vd->nv", hidden, table, preferred_element_type=jnp.float32)
    return CAP * jnp.tanh(logits / CAP)


def head(params: dict, tokens: jax.Array, prompt: int) -> losses.Head:
    """Returns a `Head` whose column t predicts the response token t. jit removes unread logits."""
    output = MODEL.apply({"params": params}, tokens, return_hidden_states=True)
    return losses.Head(unembed, params, output.hidden_states[:, prompt - 1 : -1])


@jax.jit
def train_step(params: dict, teacher: dict, state: tuple, batch: dict[str, jax.Array]):
    """Makes one update. Returns parameters, optimizer state and the divergence in nats a token."""
    asked = jnp.concatenate([batch["question"], batch["response"]], axis=1)
    hinted = jnp.concatenate([batch["hint"], asked], axis=1)

    def loss_fn(params):
        return losses.opsd(
            student=head(params, asked, QUESTION),
            teacher=head(teacher, hinted, HINT + QUESTION),
            mask=batch["mask"],
            outcomes=(batch["correct"], ~batch["correct"], jnp.zeros_like(batch["correct"])),
            options=losses.OPSD(gate=losses.GATES["correct"]),
        ).mean

    loss, gradient = jax.value_and_grad(loss_fn)(params)
    updates, state = OPTIMIZER.update(gradient, state)
    return optax.apply_updates(params, updates), state, loss


def main(steps: int = 40) -> list[float]:
    keys = jax.random.split(jax.random.key(1), 5)
    ids = lambda key, length: jax.random.randint(key, (16, length), 1, VOCAB)
    batch = {"question": ids(keys[0], QUESTION), "hint": ids(keys[1], HINT)}
    batch["response"] = ids(keys[2], RESPONSE)
    batch["mask"] = jnp.arange(RESPONSE) < jnp.arange(16)[:, None] + 1
    batch["correct"] = jax.random.bernoulli(keys[3], 0.5, (16,))  # in place of a verifier
    teacher = params = MODEL.init(keys[4], batch["question"])["params"]
    state, curve = OPTIMIZER.init(params), [0.0] * steps
    for step in range(steps):
        params, state, curve[step] = train_step(params, teacher, state, batch)
    return [float(loss) for loss in curve]


if __name__ == "__main__":
    print("divergence from the teacher at each step, in nats per token:", main())
