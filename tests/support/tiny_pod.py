"""A config for test_plan.py, whose programs XLA:TPU compiles in about a minute."""

from opsd_jax.config import loading, recipes


def get_config():
    config = recipes.paper_opsd("qwen3-0.6b")
    config.model = loading.read("quickstart").model
    config.model.update({"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 512})
    config.model.update({"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 128})
    config.model.update({"scan_unroll": 1, "dtype": "bfloat16", "remat": "full"})
    config.mesh = (1, 2, 2)
    config.opsd.update({"contexts": ("memo",), "microbatch": 4, "prompts": 8, "slots": 8})
    config.opsd.update({"prompt_tokens": 256, "response_tokens": 768, "buckets": (512, 1024)})
    config.opsd.update({"teacher_prompt_tokens": 512, "teacher_buckets": (768, 1280)})
    config.opsd.memo.update({"request_tokens": 128, "tokens": 128, "close_tokens": 128})
    config.opsd.memo.slots = 8
    config.evaluation.update({"prompt_tokens": 256, "response_tokens": 768, "slots": 8})
    return config
