"""Hugging Face's `generate` as an engine of benchmarks/rollout.py, which runs this script."""

import rollout_protocol
import torch
import transformers


def transformer(vocabulary: int) -> transformers.Qwen3ForCausalLM:
    """Returns Qwen3 in float32 with normally distributed weights."""
    m = rollout_protocol.MODEL
    config = transformers.Qwen3Config(
        vocab_size=vocabulary,
        num_hidden_layers=m["layers"],
        hidden_size=m["hidden"],
        intermediate_size=m["mlp"],
        num_attention_heads=m["heads"],
        num_key_value_heads=m["kv_heads"],
        head_dim=m["head_dim"],
        rope_parameters={"rope_type": "default", "rope_theta": m["rope_theta"]},
        tie_word_embeddings=False,
        attn_implementation="sdpa",
        dtype=torch.float32,
    )
    torch.manual_seed(0)
    return transformers.Qwen3ForCausalLM(config).eval()


def sample(model: transformers.PreTrainedModel, prompts: torch.Tensor, tokens: int) -> torch.Tensor:
    """Returns the prompts with `tokens` more tokens, sampled from the model's own distribution."""
    return model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=tokens,
    )


def engine(vocabulary: int, lengths: list[int]):
    """Samples static batches, each to its longest length. The model has no EOS token."""
    qwen3 = transformer(vocabulary)
    requests = [(torch.tensor(ids), n) for ids, n in rollout_protocol.batches(vocabulary, lengths)]

    def run():
        made = []
        for prompts, longest in requests:
            tokens = sample(qwen3, prompts, longest)
            made += [tokens.shape[1] - rollout_protocol.PROMPT] * len(tokens)
        return {"tokens": made}

    return run


if __name__ == "__main__":
    torch.set_num_threads(1)
    rollout_protocol.serve(engine)
