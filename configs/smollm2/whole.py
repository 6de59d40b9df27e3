"""SFT → RLVR → OPSD (Correct-only) of SmolLM2-135M-Instruct, on generated word problems.

    ./launch/released.sh    # opsd-jax train --config configs/smollm2/whole.py ...

Hardware: two CPU cores, 11.5 GB of memory, an estimated 75 minutes.
docs/released_model.md has the result, benchmarks/README.md what else was tried.

The released model solves almost none of the problems and writes no \\boxed{}. SFT teaches it the
arithmetic, the format and a verbose style. OPSD shortens the responses: its teacher sees the
concise solution.
"""

from opsd_jax import config as config_lib

ROLLOUTS = {"prompt_tokens": 80, "response_tokens": 112}
BUCKETS = {"microbatch": 4, "buckets": (112, 128, 152, 192), "loss_chunk": 1024}


def get_config():
    """Returns a config with three stages."""
    config = config_lib.default()
    config.task = "opsd_jax.data.word_problems:task"
    # Storing the outputs of the matmuls costs 1 GB, and spares a third of the forward passes.
    config.model = config_lib.pretrained("models/SmolLM2-135M-Instruct", remat="products")
    config.data.prompt = "{question}"
    config.data.teacher_prompt = "{question}\n\n{context}"
    config.stages = ("sft", "rlvr", "opsd")

    sft = config.sft
    sft.update({"steps": 42, "batch_size": 16, "microbatch": 4, "buckets": (128, 144, 192)})
    sft.update({"loss_chunk": 1024, "checkpoint_every": 8, "init_from": ""})
    sft.optimizer.update({"learning_rate": 2e-4, "b2": 0.98, "warmup": 4})

    rlvr = config.rlvr
    rlvr.update({"steps": 12, "prompts": 8, "group_size": 8, "slots": 64, "updates": 1})
    rlvr.update({**ROLLOUTS, **BUCKETS, "checkpoint_every": 4})
    rlvr.optimizer = config_lib.optimizer(learning_rate=1e-5, warmup=2)

    opsd = config.opsd
    opsd.update({"steps": 10, "prompts": 64, "group_size": 1, "slots": 64, "max_rows": 24})
    opsd.update({**ROLLOUTS, **BUCKETS, "checkpoint_every": 5, "contexts": ("solution",)})
    opsd.update({"teacher_prompt_tokens": 112, "teacher_buckets": (152, 168, 192, 224)})
    opsd.optimizer = config_lib.optimizer(learning_rate=5e-5, warmup=2)

    evaluation = config.evaluation
    evaluation.update({**ROLLOUTS, "problems": 256, "samples": 1, "slots": 64})
    evaluation.update({"temperature": 1.0, "top_k": 0, "top_p": 1.0})
    evaluation.divergence_responses = 64
    return config
