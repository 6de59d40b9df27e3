"""Recipes: configs for a Hugging Face model on your own problems, and comparisons of gates."""

from __future__ import annotations

from ml_collections import ConfigDict

from opsd_jax.config import sections


def own_model(preset: str = "") -> ConfigDict:
    """Returns a base config for training a Hugging Face model directory on one source of problems.

    The directory is `config.model.path` and the source `config.data.train.problems`, of which 64
    problems are held out. Rollouts have up to 8,192 tokens. Parameters are sharded over all
    devices.

    Args:
      preset: the released model whose sizes `opsd-jax plan` takes when there is no directory.
    """
    config = sections.default()
    config.mesh = (1, -1, 1)
    config.model = sections.pretrained(preset=preset)
    config.data.train.problems = sections.source()
    config.data.heldout_problems = 64
    return config


def rlvr(preset: str = "") -> ConfigDict:
    """Returns a config for RLVR with DAPO. Each step samples 8 rollouts for each of 32 problems.

    Problems whose rollouts are all correct or all incorrect are left out and replaced.

    Args:
      preset: the released model whose sizes `opsd-jax plan` takes when there is no directory.
    """
    config = own_model(preset)
    config.stages = ("rlvr",)
    config.rlvr.update(
        {
            "init_from": "",
            "resample_rounds": 2,
            "objective": sections.objective("dapo"),
            "overlong_buffer": 1024,
        }
    )
    return config


def paper_rlvr(preset: str = "") -> ConfigDict:
    """Returns a config for the RLVR baseline of arXiv 2605.06188: GRPO with 16 updates per step.

    A step has 8 rollouts of each of 256 problems, of up to 16,384 tokens, and a KL coefficient of
    0.001 to the initial model.

    Args:
      preset: the released model whose sizes `opsd-jax plan` takes when there is no directory.
    """
    config = own_model(preset)
    config.stages = ("rlvr",)
    config.rlvr.update(
        {
            "init_from": "",
            "steps": 100,
            "prompts": 256,
            "slots": 256,
            "updates": 16,
            "prompt_tokens": 2048,
            "response_tokens": 16_384,
            "buckets": (2048, 4096, 6144, 8192, 12_288, 18_432),
            "objective": sections.objective("grpo", kl_coefficient=1e-3),
        }
    )
    config.rlvr.optimizer.weight_decay = 0.1
    config.evaluation.update({"prompt_tokens": 2048, "response_tokens": 16_384})
    return config


def opsd(preset: str = "") -> ConfigDict:
    """Returns a config for OPSD on correct rollouts, with the batch size of arXiv 2605.06188.

    As in the paper, a step has one rollout of each of 32 problems. The teacher sees the solution of
    the problem or, if there is none, its answer.

    Args:
      preset: the released model whose sizes `opsd-jax plan` takes when there is no directory.
    """
    config = own_model(preset)
    config.stages = ("opsd",)
    config.opsd.init_from = ""
    return config


def paper_opsd(preset: str = "") -> ConfigDict:
    """Returns a config for OPSD as in arXiv 2605.06188. The model writes a memo for the teacher.

    The model writes the memo from the answer. A memo has up to 8,192 tokens, and 2,048 more if its
    thinking had to be closed.

    Args:
      preset: the released model whose sizes `opsd-jax plan` takes when there is no directory.
    """
    config = opsd(preset)
    config.opsd.contexts = ("memo",)
    config.opsd.memo.update({"tokens": 8192, "close_tokens": 2048})
    return config


def gate_arms(config: ConfigDict) -> ConfigDict:
    """Replaces the last stage, `opsd`, by one for each of three gates: correct, incorrect and all.

    All three start from what `opsd` started from.

    Args:
      config: a config, which is changed.
    """
    arms = {f"opsd_{gate}": gate for gate in ("correct", "incorrect", "all")}
    with config.unlocked():
        for name, gate in arms.items():
            config[name] = config.opsd.copy_and_resolve_references()
            config[name].gate = gate
        del config.opsd
    config.stages = (*config.stages[:-1], *arms)
    return config
