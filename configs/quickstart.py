"""The quickstart: SFT → RLVR → OPSD (Correct-only) on the built-in task, from random weights.

    opsd-jax train --config quickstart --workdir runs/quickstart

Hardware: two CPU cores, 2 GB of memory; about five minutes. Expect RLVR to raise held-out accuracy
by more than 10 points, and OPSD then to shorten responses by about 45 % at the accuracy of RLVR.
docs/config.md lists every field; `--config.opsd.gate=incorrect` changes one.
"""

from opsd_jax import config as config_lib


def get_config():
    """Returns a config with three stages and a decoder of 0.1 million parameters."""
    config = config_lib.default()
    config.task = "opsd_jax.data.arithmetic:task"
    config.data.tokenizer = "opsd_jax.data.tokenizer:ByteTokenizer"
    config.model = config_lib.decoder(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=176,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        rope_theta=1000.0,
        scan_unroll=3,
    )

    sft = config.sft
    sft.update({"steps": 1300, "batch_size": 32, "microbatch": 32, "buckets": (56, 80, 128)})
    sft.optimizer.update({"learning_rate": 3e-3, "b2": 0.98, "warmup": 50})

    rlvr = config.rlvr
    rlvr.update({"steps": 40, "prompts": 32, "group_size": 8, "slots": 128, "updates": 2})
    rlvr.update({"prompt_tokens": 16, "response_tokens": 88})
    rlvr.update({"microbatch": 32, "buckets": (64, 103), "checkpoint_every": 10})
    rlvr.optimizer = config_lib.optimizer(learning_rate=2e-4)

    opsd = config.opsd
    opsd.update({"steps": 25, "prompts": 256, "group_size": 1, "slots": 128, "max_rows": 64})
    opsd.update({"contexts": ("solution",), "prompt_tokens": 16, "response_tokens": 88})
    opsd.update({"microbatch": 16, "buckets": (56, 103), "checkpoint_every": 5})
    opsd.update({"teacher_prompt_tokens": 39, "teacher_buckets": (80, 126)})
    opsd.optimizer = config_lib.optimizer(learning_rate=2e-4)

    evaluation = config.evaluation
    evaluation.update({"problems": 512, "samples": 4, "slots": 256})
    evaluation.update({"temperature": 1.0, "top_k": 0, "top_p": 1.0})
    evaluation.update({"prompt_tokens": 16, "response_tokens": 88})
    return config
