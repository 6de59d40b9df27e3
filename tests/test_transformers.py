"""The decoder against Hugging Face's Qwen3 on torch: the same weights give the same logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_tokens

from opsd_jax.models import decoder
from opsd_jax.rollout import sampler

torch = pytest.importorskip("torch", reason="needs the extra `parity`")
transformers = pytest.importorskip("transformers", reason="needs the extra `parity`")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def pair(config, request):
    """A torch model, weights of standard deviation 0.2 and jittered norms, and ours with them."""
    ours = config.model.copy_and_resolve_references()
    ours.tie_word_embeddings = request.param
    ours.rope_theta = 5e5
    torch.manual_seed(0)
    hf = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=ours.vocab_size,
            hidden_size=ours.hidden_size,
            intermediate_size=ours.intermediate_size,
            num_hidden_layers=ours.num_layers,
            num_attention_heads=ours.num_heads,
            num_key_value_heads=ours.num_kv_heads,
            head_dim=ours.head_dim,
            rms_norm_eps=ours.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": ours.rope_theta},
            tie_word_embeddings=request.param,
            max_position_embeddings=256,
        )
    ).eval()
    with torch.no_grad():
        for name, weight in hf.named_parameters():
            weight.normal_(1.0 if "norm" in name else 0.0, 0.2)
    weights = {k: v.detach().numpy() for k, v in hf.named_parameters()}

    H, K, C, D = ours.num_heads, ours.num_kv_heads, ours.head_dim, ours.hidden_size
    layout = {  # ours -> (theirs, from their [out, in] to our shape)
        "attention_norm": ("input_layernorm", lambda w: w),
        "mlp_norm": ("post_attention_layernorm", lambda w: w),
        "q_norm": ("self_attn.q_norm", lambda w: w),
        "k_norm": ("self_attn.k_norm", lambda w: w),
        "q": ("self_attn.q_proj", lambda w: w.T.reshape(D, H, C)),
        "k": ("self_attn.k_proj", lambda w: w.T.reshape(D, K, C)),
        "v": ("self_attn.v_proj", lambda w: w.T.reshape(D, K, C)),
        "o": ("self_attn.o_proj", lambda w: w.T.reshape(H, C, D)),
        "gate": ("mlp.gate_proj", lambda w: w.T),
        "up": ("mlp.up_proj", lambda w: w.T),
        "down": ("mlp.down_proj", lambda w: w.T),
    }
    params = {
        "embedding": weights["model.embed_tokens.weight"],
        "norm": weights["model.norm.weight"],
        "layers": {
            name: np.stack(
                [
                    shape(weights[f"model.layers.{i}.{theirs}.weight"])
                    for i in range(ours.num_layers)
                ]
            )
            for name, (theirs, shape) in layout.items()
        },
    }
    if not request.param:
        params["head"] = weights["lm_head.weight"].T
    return hf, decoder.from_config(ours).policy, jax.tree.map(jnp.asarray, params)


@pytest.mark.parametrize("left", [0, 5])
def test_logits(pair, left):
    hf, policy, params = pair
    tokens = np.array(random_tokens(3, (2, 40)))
    positions = np.broadcast_to(np.arange(40) - left, (2, 40)).copy()
    positions[positions < 0] = -1
    with torch.no_grad():
        expected = hf(
            torch.tensor(tokens),
            attention_mask=torch.tensor(positions >= 0).long(),
            position_ids=torch.tensor(positions).clamp(min=0),
        ).logits.numpy()
    hidden, _ = policy.forward(params, jnp.array(tokens), jnp.array(positions))
    logits = policy.unembed(params, hidden)
    np.testing.assert_allclose(logits[:, left:], expected[:, left:], atol=1e-4, rtol=1e-4)


def test_greedy_continuation(pair):
    hf, policy, params = pair
    prompt = np.array(random_tokens(4, (1, 7)))
    with torch.no_grad():
        expected = hf.generate(
            torch.tensor(prompt), max_new_tokens=100, do_sample=False, eos_token_id=None
        )[0, 7:].numpy()
    samples = sampler.generate(
        policy,
        params,
        jnp.array(prompt),
        jnp.arange(7)[None],
        jnp.zeros(1, jnp.int32),
        jax.random.key(0),
        jnp.float32(0),
        jnp.array([-1]),
        jnp.int32(0),
        max_new_tokens=100,
    )
    np.testing.assert_array_equal(samples.tokens[0], expected)
