"""The checks of a config before anything is built: each field by itself, and with others."""

from __future__ import annotations

import importlib.util
import math
import re
import sys
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from opsd_jax import config as config_lib
from opsd_jax import losses
from opsd_jax.config import loading as config_files
from opsd_jax.data import contexts
from opsd_jax.stages import teacher as teacher_lib
from opsd_jax.stages.privileged import inserted_tokens

# Bounds of numbers, by the last part of the field's name.
_AT_LEAST_ONE = {
    "steps", "batch_size", "microbatch", "prompts", "slots", "prompt_tokens",
    "teacher_prompt_tokens", "response_tokens", "updates", "checkpoint_every",
    "samples", "max_nonfinite", "group_size", "request_tokens", "tokens", "close_tokens",
    "reminder_tokens", "every", "last",
}  # fmt: skip
_NOT_NEGATIVE = {
    "temperature", "max_rows", "warmup", "weight_decay", "final_fraction", "seed",
    "loss_chunk", "overlong_factor", "resample_rounds", "workers", "top_k", "reinject_every",
    "heldout_problems", "period",
}  # fmt: skip
_POSITIVE = {
    "learning_rate",
    "clip_norm",
    "rope_theta",
    "rms_norm_eps",
    "weight",
    "seconds",
    "memory_mb",
}


def validate(config: ConfigDict, *, data: bool = True) -> None:
    """Raises ConfigError for the first field that cannot be run, before anything is built; without
    `data` the sources may be missing.
    """

    def fail(field: str, value: Any, expected: str):
        raise config_lib.ConfigError(f"config.{field} is {value!r}; expected {expected}.")

    if data:
        _validate_sources(config.data, fail)
    largest = sys.float_info.max  # what stands for infinity
    for field, value in config_files.flatten(config).items():
        if field.startswith("data.template_options."):
            continue  # a chat template's own
        name = field.rsplit(".", 1)[-1]
        if isinstance(value, float) and math.isnan(value):
            fail(field, value, "a number")
        if name in _AT_LEAST_ONE and value < 1:
            fail(field, value, "at least 1")
        if name in _NOT_NEGATIVE and not 0 <= value < largest:
            fail(field, value, "a number not below 0")
        if name in _POSITIVE and not 0 < value < largest:
            fail(field, value, "a number above 0")
        if field == "evaluation.problems" and value != 0 and value < 2:
            fail(field, value, "at least 2, for a standard error, or 0 for all")
        if name == "seed" and value >= 2**31:
            fail(field, value, "less than 2^31")
        if name == "top_p" and not 0 < value <= 1:
            fail(field, value, "a mass in (0, 1]")
        if name == "min_p" and not 0 <= value <= 1:
            fail(field, value, "a share in [0, 1]")
        if name in ("b1", "b2") and not 0 <= value < 1:
            fail(field, value, "a number in [0, 1)")
        if name == "moment_dtype" and value not in ("float32", "bfloat16"):
            fail(field, value, "'float32' or 'bfloat16'")
        if name == "schedule" and value not in ("constant", "cosine"):
            fail(field, value, "'constant' or 'cosine'")
        if name in ("buckets", "teacher_buckets") and not (
            (value or name == "teacher_buckets")
            and all(type(length) is int and length > 0 for length in value)
            and sorted(set(value)) == value
        ):
            fail(field, tuple(value), "lengths above 0 in ascending order")
        if name == "gate":
            try:
                losses.parse_gate(value)
            except ValueError as error:
                raise config_lib.ConfigError(f"config.{field}: {error}") from None

    for field, kind in (("stages", str), ("mesh", int), ("decode_mesh", int)):
        if not all(type(value) is kind for value in config[field]):
            fail(field, config[field], f"a tuple of {kind.__name__}")
    if config.wandb_project and importlib.util.find_spec("wandb") is None:
        fail(
            "wandb_project",
            config.wandb_project,
            "'' without the extra: pip install 'opsd-jax[wandb]'",
        )
    if len({*config.stages, "untrained", "report"}) != len(config.stages) + 2:
        fail("stages", config.stages, "names that differ, none of them 'untrained' or 'report'")
    for i, stage in enumerate(config.stages):
        section = config.get(stage)
        if not isinstance(section, ConfigDict) or "algorithm" not in section:
            stages = [
                k for k, v in config.items() if isinstance(v, ConfigDict) and "algorithm" in v
            ]
            fail("stages", tuple(config.stages), f"names of sections among {', '.join(stages)}")
        if section.algorithm not in ("sft", "rlvr", "opsd"):
            fail(f"{stage}.algorithm", section.algorithm, "'sft', 'rlvr' or 'opsd'")
        if section.init_from and section.init_from not in config.stages[:i]:
            fail(f"{stage}.init_from", section.init_from, "'' or a stage before this one")
        updates = section.steps * section.get("updates", 1)
        if section.optimizer.warmup >= updates:
            fail(
                f"{stage}.optimizer.warmup",
                section.optimizer.warmup,
                f"less than {updates}, the stage's updates",
            )
        if section.algorithm != "sft":
            longest = section.prompt_tokens + section.response_tokens - 1
            if section.buckets[-1] < longest:
                fail(
                    f"{stage}.buckets",
                    section.buckets,
                    f"a last one of at least {longest}, as prompt_tokens and response_tokens ask",
                )
            rollouts = section.prompts * section.group_size
            parts = {
                "rlvr": ("objective", losses.PolicyGradient),
                "opsd": ("loss", losses.OPSD),
            }[section.algorithm]
            try:
                parts[1](**section[parts[0]]).check()
            except (TypeError, ValueError) as error:
                raise config_lib.ConfigError(f"config.{stage}.{parts[0]}: {error}") from None
            if section.temperature == 0:
                fail(f"{stage}.temperature", 0, "above 0: a stage learns from what it samples")
            if section.algorithm == "rlvr":
                if section.group_size < 2:
                    fail(f"{stage}.group_size", section.group_size, "at least 2, to be compared")
                if not 0 <= section.overlong_buffer <= section.response_tokens:
                    fail(
                        f"{stage}.overlong_buffer",
                        section.overlong_buffer,
                        f"from 0, for none, to the budget of {section.response_tokens} tokens",
                    )
                dropped = section.objective.drop_uninformative
                if section.resample_rounds and not dropped:
                    fail(
                        f"{stage}.resample_rounds",
                        section.resample_rounds,
                        "0, or objective.drop_uninformative: nothing is left out to be replaced",
                    )
            if section.algorithm == "opsd":
                _validate_teaching(stage, section, fail)
            if section.algorithm == "rlvr" and rollouts % (section.updates * section.group_size):
                fail(f"{stage}.updates", section.updates, f"a divisor of {section.prompts} prompts")


def _validate_teaching(
    stage: str, section: ConfigDict, fail: Callable[[str, Any, str], None]
) -> None:
    """Calls `fail` for the first field of an OPSD stage's contexts and teacher that cannot be."""
    kinds, teacher = tuple(section.contexts), section.teacher
    there = section.teacher_buckets
    longest = section.teacher_prompt_tokens + section.response_tokens - 1
    longest += inserted_tokens(section, section.response_tokens)
    if there and (len(there) != len(section.buckets) or there[-1] < longest):
        fail(
            f"{stage}.teacher_buckets",
            there,
            f"one for each of {stage}.buckets, the last at least {longest}, or () for none",
        )
    known = ", ".join(contexts.CONTEXTS)
    if not kinds or not all(kind in contexts.CONTEXTS or ":" in kind for kind in kinds):
        expected = f"a tuple of kinds among {known}, or 'package.module:function'"
        fail(f"{stage}.contexts", kinds, expected)
    if section.sibling not in contexts.SIBLINGS:
        fail(f"{stage}.sibling", section.sibling, f"one of {', '.join(contexts.SIBLINGS)}")
    if "sibling" in kinds and section.group_size < 2:
        fail(
            f"{stage}.group_size", section.group_size, "at least 2, for a rollout to have siblings"
        )
    if "column" in kinds and not section.context_column:
        fail(f"{stage}.context_column", "", "the name of one of the sources' `extra` columns")
    if teacher.kind not in teacher_lib.KINDS:
        fail(f"{stage}.teacher.kind", teacher.kind, f"one of {', '.join(teacher_lib.KINDS)}")
    if teacher.kind in ("ema", "trust_region") and not 0 < teacher.rate <= 1:
        fail(f"{stage}.teacher.rate", teacher.rate, "a number in (0, 1]")


def _validate_sources(data: ConfigDict, fail: Callable[[str, Any, str], None]) -> None:
    """Calls `fail` for the first field of a source that cannot be used."""
    names = [name for part in config_lib.SOURCES for name in data[part]]
    default = config_files.flatten(config_lib.source())
    for part in config_lib.SOURCES:
        for name, section in data[part].items():
            field = f"data.{part}.{name}"
            if not isinstance(section, ConfigDict) or set(config_files.flatten(section)) != set(
                default
            ):
                fail(field, section, "what opsd_jax.config.source returns")
            for inner, value in config_files.flatten(section).items():
                _validate_type(f"{field}.{inner}", value, default[inner], fail)
            if not re.fullmatch(r"[\w-]+", name) or names.count(name) > 1:
                fail(field, section.path, "a name of its own, of letters, digits, _ and -")
            if not section.path:
                fail(f"{field}.path", section.path, "a file or folder")
            if not 0 < section.weight < float("inf"):
                fail(f"{field}.weight", section.weight, "a number above 0")
            if section.bad_rows not in ("refuse", "drop"):
                fail(f"{field}.bad_rows", section.bad_rows, "'refuse' or 'drop'")
            if not section.columns.question:
                fail(f"{field}.columns.question", "", "the name of a column")
            for bound, rate in section.pass_rates.items():
                if bound != "path" and not 0 <= rate <= 1:
                    expected = "a share in [0, 1], such as 0.9 for 90 percent"
                    fail(f"{field}.pass_rates.{bound}", rate, expected)
            for bounds in ("difficulty", "pass_rates"):
                low, high = section[bounds].low, section[bounds].high
                if not low <= high:
                    fail(f"{field}.{bounds}.low", low, f"at most {high}, its high")
    weights = {name: section.weight for name, section in data.train.items()}
    for name, weight in weights.items():
        if weight < 1e-6 * sum(weights.values()):
            least = f"at least a millionth of all, {sum(weights.values())}: it would never come"
            fail(f"data.train.{name}.weight", weight, least)


def _validate_type(
    field: str, value: Any, default: Any, fail: Callable[[str, Any, str], None]
) -> None:
    """Calls `fail` for a value of another type than the default's; an int does for a float."""
    kinds = {float: ("a number", (float, int)), list: ("a tuple of strings", (list,))}
    kind = type(default)
    expected, allowed = kinds.get(kind, (f"of type {kind.__name__}", (kind,)))
    items = value if isinstance(value, list) else []
    if type(value) not in allowed or not all(isinstance(item, str) for item in items):
        fail(field, value, expected)
    if isinstance(value, float) and math.isnan(value):
        fail(field, value, expected)
