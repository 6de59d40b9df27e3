"""Where configs for Hugging Face models begin."""

from __future__ import annotations

from ml_collections import ConfigDict

from opsd_jax import config as config_lib


def own_model(preset: str = "") -> ConfigDict:
    """A model's directory is `model.path`, its data the source `problems`, of which 64 are held
    out; rollouts of up to 8,192 tokens in both stages.

    Args:
      preset: the model's sizes, for `opsd-jax plan` without the directory.
    """
    config = config_lib.default()
    config.mesh = (1, -1, 1)  # parameters cut over all devices
    config.model = config_lib.pretrained(preset=preset)
    config.task = "opsd_jax.data.text:task"
    config.data.tokenizer = ""
    config.data.train.problems = config_lib.source()
    config.data.heldout_problems = 64
    for stage in (config.rlvr, config.opsd):
        stage.update({"prompt_tokens": 1024, "response_tokens": 8192, "microbatch": 16})
        stage.buckets = (1536, 3072, 5120, 9216)
        stage.optimizer.update({"b2": 0.999, "weight_decay": 0.01})
    config.evaluation.update({"problems": 0, "samples": 8, "slots": 128})
    config.evaluation.update({"temperature": 0.6, "top_p": 0.95, "top_k": 20})
    config.evaluation.update({"prompt_tokens": 1024, "response_tokens": 8192})
    return config


def rlvr(preset: str = "") -> ConfigDict:
    """DAPO: 8 rollouts of each of 32 problems a step; problems that are always or never solved are
    left out and replaced.
    """
    config = own_model(preset)
    config.stages = ("rlvr",)
    config.rlvr.update(
        {
            "init_from": "",
            "steps": 200,
            "prompts": 32,
            "group_size": 8,
            "slots": 128,
            "updates": 2,
            "resample_rounds": 2,
            "objective": config_lib.objective("dapo"),
            "overlong_buffer": 1024,
            "checkpoint_every": 20,
        }
    )
    config.rlvr.optimizer.update({"learning_rate": 1e-6, "warmup": 10})
    return config


def paper_rlvr(preset: str = "") -> ConfigDict:
    """The paper's baseline (arXiv 2605.06188): GRPO, 8 rollouts of each of 256 problems a step, of
    up to 16,384 tokens, 16 updates, a KL of 0.001 to the model before.
    """
    config = own_model(preset)
    config.stages = ("rlvr",)
    config.rlvr.update(
        {
            "init_from": "",
            "steps": 100,
            "prompts": 256,
            "group_size": 8,
            "slots": 256,
            "updates": 16,
            "prompt_tokens": 2048,
            "response_tokens": 16_384,
            "objective": config_lib.objective("grpo", kl_coefficient=1e-3),
            "checkpoint_every": 20,
        }
    )
    config.rlvr.buckets = (2048, 4096, 6144, 8192, 12_288, 18_432)
    config.evaluation.update({"prompt_tokens": 2048, "response_tokens": 16_384})
    config.rlvr.optimizer.update({"learning_rate": 1e-6, "warmup": 10, "weight_decay": 0.1})
    return config


def opsd(preset: str = "") -> ConfigDict:
    """Correct-only, with sampling, batch and optimiser of the paper's code (arXiv 2605.06188): 32
    problems a step, one rollout each; the teacher sees a solution, or else the answer.
    """
    config = own_model(preset)
    config.stages = ("opsd",)
    config.opsd.update(
        {
            "init_from": "",
            "steps": 100,
            "gate": "correct",
            "prompts": 32,
            "group_size": 1,
            "slots": 32,
            "contexts": ("solution", "answer"),
            "teacher_prompt_tokens": 4096,
            "teacher_buckets": (3072, 4608, 6656, 12_288),
            "max_rows": 0,
            "checkpoint_every": 25,
        }
    )
    config.opsd.optimizer.learning_rate = 1e-6
    return config


def paper_opsd(preset: str = "") -> ConfigDict:
    """`opsd` with the paper's context: a memo that the model writes when it is told the answer, of
    up to 8,192 tokens, and 2,048 where its thinking had to be closed.
    """
    config = opsd(preset)
    config.opsd.contexts = ("memo",)
    config.opsd.memo.update({"tokens": 8192, "close_tokens": 2048})
    return config
