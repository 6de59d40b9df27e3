"""Checks the losses on a model of another library, in an environment that has this library.

    python inside_other_models.py tunix|gemma EXAMPLE
    python inside_other_models.py easydel|levanter|maxtext

The `Head` of the example, or the one here, must give the losses and the gradients of the logits
that the model itself returns. The example must run. See tests/losses/test_other_models.py.
"""

import runpy
import sys

import jax
import jax.numpy as jnp
import numpy as np

from opsd_jax import losses

VOCAB, ROWS, PROMPT, RESPONSE = 64, 8, 5, 9  # the models of the examples have this vocabulary


def tunix(example):
    """Yields (name, make_params, head, logits) for Qwen3 with a tied and with its own head."""
    from flax import nnx
    from tunix.models.qwen3.model import ModelConfig, Qwen3

    for tied in (True, False):
        config = ModelConfig(2, VOCAB, 32, 64, 4, 8, 2, 10_000, 1e-6, use_tied_embedding=tied)
        make = lambda seed, config=config: nnx.split(Qwen3(config, rngs=nnx.Rngs(seed)))
        graphdef, _ = make(0)

        def logits(params, tokens, graphdef=graphdef):
            length = tokens.shape[1]
            positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
            causal = jnp.broadcast_to(jnp.tri(length, dtype=bool), (ROWS, length, length))
            return nnx.merge(graphdef, params)(tokens, positions, None, causal)[0]

        def head(params, tokens, graphdef=graphdef):
            return example["head"](nnx.merge(graphdef, params), tokens, PROMPT)

        yield f"tied={tied}", lambda seed, make=make: make(seed)[1], head, logits


def gemma(example):
    """Yields (name, make_params, head, logits) for Gemma with a soft cap."""
    model, tokens = example["MODEL"], jnp.ones((1, 4), jnp.int32)
    yield (
        "soft cap",
        lambda seed: model.init(jax.random.key(seed), tokens)["params"],
        lambda params, tokens: example["head"](params, tokens, PROMPT),
        lambda params, tokens: model.apply({"params": params}, tokens).logits,
    )


def nnx_functions(make, hidden_states, unembed, logits):
    """Returns make_params, head and logits of NNX modules, given functions of such a module."""
    from flax import nnx

    graphdef, _, others = nnx.split(make(0), nnx.Param, ...)
    merge = lambda params: nnx.merge(graphdef, params, others)

    def head(params, tokens):
        hidden = hidden_states(merge(params), tokens)[:, PROMPT - 1 : -1]
        return losses.Head(lambda params, hidden: unembed(merge(params), hidden), params, hidden)

    return (
        lambda seed: nnx.state(make(seed), nnx.Param),
        head,
        lambda params, tokens: logits(merge(params), tokens),
    )


def easydel():
    """Yields (name, make_params, head, logits) for Llama with a tied and with its own head."""
    for name in ("glm4v_moe", "phimoe", "qwen3_5_moe", "qwen3_next"):
        # EasyDeL changes these modules of transformers, which fails where PyTorch is missing.
        sys.modules[f"transformers.models.{name}"] = None
    from easydel.modules.llama import LlamaConfig, LlamaForCausalLM
    from flax import nnx

    float32 = {"dtype": jnp.float32, "param_dtype": jnp.float32}
    for tied in (True, False):
        config = LlamaConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1,
            tie_word_embeddings=tied,
        )  # fmt: skip
        with config.mesh:
            yield (
                f"tied={tied}",
                *nnx_functions(
                    make=lambda seed, c=config: LlamaForCausalLM(c, **float32, rngs=nnx.Rngs(seed)),
                    hidden_states=lambda model, x: model(x, apply_lm_head=False).last_hidden_state,
                    unembed=lambda model, hidden: model.compute_lm_logits(hidden),
                    logits=lambda model, tokens: model(tokens).logits,
                ),
            )


def levanter():
    """Yields (name, make_params, head, logits) for Llama with a tied and with its own head."""
    import haliax as hax
    from levanter.layers.attention import AttentionMask
    from levanter.models.llama import LlamaConfig, LlamaLMHeadModel

    def named(tokens):
        return hax.named(tokens, ("batch", "position"))

    def unembed(model, hidden):
        hidden = hax.named(hidden, ("token", model.Embed))
        return hax.dot(hidden, model.get_lm_head(), axis=model.Embed).array

    def head(model, tokens):
        hidden = model.activations(named(tokens), AttentionMask.causal()).array
        return losses.Head(unembed, model, hidden[:, PROMPT - 1 : -1])

    for tied in (True, False):
        config = LlamaConfig(
            seq_len=PROMPT + RESPONSE, hidden_dim=32, intermediate_dim=64, num_layers=2,
            num_heads=4, num_kv_heads=2, tie_word_embeddings=tied,
        )  # fmt: skip
        yield (
            f"tied={tied}",
            lambda seed, config=config: LlamaLMHeadModel.init(
                hax.Axis("vocab", VOCAB), config, key=jax.random.key(seed)
            ),
            head,
            lambda model, tokens: model(named(tokens), AttentionMask.causal()).array,
        )


def maxtext():
    """Yields (name, make_params, head, logits) for Llama; a tied head is bfloat16 in MaxText."""
    from flax import linen, nnx
    from maxtext.common.common_types import MODEL_MODE_TRAIN
    from maxtext.configs import pyconfig
    from maxtext.models.models import Transformer
    from maxtext.utils.maxtext_utils import get_mesh_from_config

    config = pyconfig.initialize(
        run_name="tiny", decoder_block="llama2", vocab_size=VOCAB, base_emb_dim=32,
        base_mlp_dim=64, base_num_decoder_layers=2, base_num_query_heads=4, base_num_kv_heads=2,
        head_dim=8, max_target_length=PROMPT + RESPONSE, dtype="float32", attention="dot_product",
        hardware="cpu", skip_jax_distributed_system=True,
    )  # fmt: skip
    positions = lambda tokens: jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

    def hidden_states(model, tokens):  # before the final norm, which `unembed` applies
        where = positions(tokens)
        return model.decoder(model.token_embedder, tokens, where, deterministic=True)[1]

    def unembed(model, hidden):
        hidden = hidden[None]
        return model.logits_from_hidden_states_for_vocab_tiling(hidden, True, MODEL_MODE_TRAIN)[0]

    mesh = get_mesh_from_config(config)
    with jax.set_mesh(mesh), linen.logical_axis_rules(config.logical_axis_rules):
        yield (
            "llama2",
            *nnx_functions(
                make=lambda seed: Transformer(config, mesh, None, rngs=nnx.Rngs(seed)),
                hidden_states=hidden_states,
                unembed=unembed,
                logits=lambda model, tokens: model(tokens, positions(tokens), enable_dropout=False),
            ),
        )


LIBRARIES = {f.__name__: f for f in (tunix, gemma, easydel, levanter, maxtext)}


def check(params, teacher, tokens, head, logits):
    """Asserts that losses and gradients are those of the model's own logits."""
    rng = np.random.default_rng(0)
    common = {"mask": jnp.asarray(rng.random((ROWS, RESPONSE)) < 0.7)}
    sampled = {"tokens": tokens[:, PROMPT:]}
    correct = jnp.asarray(rng.random(ROWS) < 0.5)
    outcomes = (correct, ~correct, jnp.zeros(ROWS, bool))
    rollouts = {
        "advantages": jnp.asarray(rng.standard_normal(ROWS), jnp.float32),
        "behaviour_logprobs": jnp.asarray(-3 - rng.random((ROWS, RESPONSE)), jnp.float32),
    }
    every = {
        "sft": lambda s, t: losses.sft(student=s, **common, **sampled),
        "opsd": lambda s, t: losses.opsd(student=s, teacher=t, outcomes=outcomes, **common),
        "pg": lambda s, t: losses.policy_gradient(student=s, **common, **sampled, **rollouts),
    }
    own = lambda params, tokens: logits(params, tokens)[:, PROMPT - 1 : -1]
    for name, loss in every.items():
        ours, theirs = (
            jax.jit(jax.value_and_grad(
                lambda p, of=of, loss=loss: loss(of(p, tokens), of(teacher, tokens)).mean
            ))(params)
            for of in (head, own)
        )  # fmt: skip
        assert abs(float(theirs[0])) > 1e-3, name
        np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)
        scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(theirs[1]))
        for a, b in zip(jax.tree.leaves(ours[1]), jax.tree.leaves(theirs[1]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * scale)
        print(f"{name}: {float(ours[0]):.6f}")


def main(library, *paths):
    examples = [runpy.run_path(path) for path in paths]  # one or none
    ids = np.random.default_rng(1).integers(1, VOCAB, (ROWS, PROMPT + RESPONSE))
    for name, make, head, logits in LIBRARIES[library](*examples):
        print(name)
        # Three times the initial parameters predict far from uniformly.
        params, teacher = (jax.tree.map(lambda x: 3 * x, make(seed)) for seed in (0, 1))
        check(params, teacher, jnp.asarray(ids, jnp.int32), head, logits)
    for example in examples:
        curve = example["main"]()
        assert curve[-1] < 0.3 * curve[0], curve


if __name__ == "__main__":
    main(*sys.argv[1:])
