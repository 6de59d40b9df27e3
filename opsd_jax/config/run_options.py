"""`RunOptions`, the typed options of a whole run, and the functions that parse and check it."""

from __future__ import annotations

import dataclasses
import importlib.util
import types
from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from opsd_jax.data.options import DataOptions
from opsd_jax.evaluation.options import EvaluationOptions
from opsd_jax.models.lora import LoRAOptions
from opsd_jax.models.options import DecoderOptions, PretrainedOptions, default_dtype
from opsd_jax.models.quantised import QuantisationOptions
from opsd_jax.options import ConfigError, fail, fields_of, lock, option, parse, section
from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.stages import algorithm_of
from opsd_jax.stages.algorithm import Algorithm
from opsd_jax.stages.options import EARLIER_STAGE, StageOptions
from opsd_jax.storage.names import NAME, NAMES, RESERVED
from opsd_jax.training.checkpoint import CheckpointOptions
from opsd_jax.verify.pool import PoolOptions

# Options class of a `model` section, by the function that makes the model. Any other function, such
# as a user's, gets the section itself as a ConfigDict.
MODELS: dict[str, type] = {
    "opsd_jax.models.decoder:from_config": DecoderOptions,
    "opsd_jax.models.pretrained:from_config": PretrainedOptions,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """All options of a run. `sections` maps the name of each stage to its options."""

    seed: int = option(0, "Seed of the whole run.", at_least=0, below=2**31)
    stages: tuple[str, ...] = option(
        ("sft", "rlvr", "opsd"),
        "Stages to run, in order: names of sections with an `algorithm`.",
        expects=f"distinct names, none of them {', '.join(map(repr, RESERVED))}",
        check=lambda stages: len({*stages, *RESERVED}) == len(stages) + len(RESERVED),
    )
    init_from: str = option(
        "",
        "Result of another run, RUN/STAGE, that replaces the model's own initial parameters; '' "
        "for none.",
        added=True,
    )
    mesh: tuple[int, ...] = option(
        (-1, 1, 1),
        "Sizes of the mesh axes data, fsdp and tensor; -1 takes the remaining devices.",
        expects=mesh_lib.SHAPE,
        check=mesh_lib.is_shape,
    )
    decode_mesh: tuple[int, ...] = option(
        (),
        "Mesh sizes while sampling, when weights are sharded over tensor alone; () is `mesh`.",
        expects=f"() or {mesh_lib.SHAPE}",
        check=lambda shape: not shape or mesh_lib.is_shape(shape),
    )
    rollout_quantisation: QuantisationOptions = option(
        QuantisationOptions(),
        "Rollouts of the stages in 8 bits. Training and evaluations are not affected.",
        added=True,
    )
    adapter: LoRAOptions = option(
        LoRAOptions(),
        "A low-rank adapter, which the stages train in place of all parameters.",
        added=True,
    )
    task: str = option(
        "opsd_jax.data.text:task",
        "Function that takes the section `data` and returns a Task.",
        expects="'package.module:function'",
    )
    data: DataOptions = option(DataOptions(), "Problems, prompts and privileged contexts.")
    model: Any = option(PretrainedOptions(), "The model; its fields depend on `model.make`.")
    evaluation: EvaluationOptions = option(
        EvaluationOptions(), "The evaluation of every stage on held-out problems."
    )
    pool: PoolOptions = option(PoolOptions(), "The processes that verify responses.")
    checkpoints: CheckpointOptions = option(
        CheckpointOptions(), "Which checkpoints of a stage are kept."
    )
    max_nonfinite: int = option(
        10,
        "Number of consecutive steps with a non-finite gradient after which the run stops.",
        at_least=1,
    )
    max_without_signal: int = option(
        50,
        "Number of consecutive steps without a gradient, because no rollout trains the model, "
        "after which the run stops; 0 never stops it.",
        at_least=0,
        added=True,
    )
    compilation_cache: str = option(
        "auto",
        "Directory that keeps compiled programs, so that a restarted run does not compile again; "
        "'' for none. 'auto': JAX_COMPILATION_CACHE_DIR if it is set; else `compiled/` next to the "
        "work directory, if that is in a bucket or there are several processes; else a directory "
        "in the user's cache. Loading a program executes code: name only your own.",
        added=True,
    )
    executables: str = option(
        "",
        "Directory of programs that `opsd-jax plan --executables` compiled; '' for none. The run "
        "loads those that fit and compiles the others. This executes code: name only your own.",
        added=True,
    )
    wandb_project: str = option(
        "", "Weights & Biases project; '' for none. Needs the extra `wandb`."
    )
    sections: Mapping[str, StageOptions] = dataclasses.field(
        default_factory=lambda: types.MappingProxyType({})
    )

    def algorithm(self, name: str) -> Algorithm:
        """Returns the `Algorithm` of the stage `name`."""
        return algorithm_of(self.sections[name].algorithm, f"{name}.algorithm")

    def check_stages(self) -> None:
        """Checks that the stages exist and are in order, and that wandb is installed if it is used.

        Raises:
          ConfigError: one of these checks fails.
        """
        for i, name in enumerate(self.stages):
            if name not in self.sections:
                known = ", ".join(self.sections)
                expected = f"names of stages ({known}), but {name!r} is not a stage"
                fail("stages", self.stages, expected)
            if not NAME.fullmatch(name):
                raise ConfigError(f"config has a stage named {name!r}; expected {NAMES}.")
            before = self.sections[name].init_from
            if before and before not in self.stages[:i]:
                fail(f"{name}.init_from", before, EARLIER_STAGE)
        if unknown := [name for name in self.adapter.stages if name not in self.sections]:
            expected = f"names of stages ({', '.join(self.sections)}), but {unknown[0]!r} is none"
            fail("adapter.stages", self.adapter.stages, expected)
        first = next((name for name in self.stages if not self.sections[name].init_from), "")
        if self.stages and self.adapter.kind == "lora":
            if not any(map(self.adapter.trains, self.stages)):
                expected = f"() or one of config.stages = {self.stages}, so that a stage trains it"
                fail("adapter.stages", self.adapter.stages, expected)
            if self.adapter.path and not self.adapter.trains(first):
                expected = f"'', because the first stage, {first!r}, does not train the adapter"
                fail("adapter.path", self.adapter.path, expected)
        if self.wandb_project and importlib.util.find_spec("wandb") is None:
            expected = "'', because wandb is not installed (pip install 'opsd-jax[wandb]')"
            fail("wandb_project", self.wandb_project, expected)


def parse_run(config: ConfigDict, platform: str = "") -> RunOptions:
    """Converts a config to `RunOptions` and checks it, without reading any file.

    Args:
      config: the config.
      platform: where the run computes, such as "tpu", which decides what `model.dtype = "auto"` is;
        "" for the default platform of this process.

    Raises:
      ConfigError: a field is unknown or has an invalid value.
    """
    own = [name for name in fields_of(RunOptions) if name != "sections"]
    sections: dict[str, StageOptions] = {}
    for name, value in config.items():
        if name in own:
            continue
        if not isinstance(value, ConfigDict) or "algorithm" not in value:
            raise ConfigError(
                f"config.{name}: there is no such field; expected one of {', '.join(own)}, or a "
                "stage: a section with the field `algorithm`."
            )
        algorithm = algorithm_of(value.algorithm, f"{name}.algorithm")
        # A stage that does not run may keep values that contradict each other.
        sections[name] = parse(algorithm.options, value, name, whole=name in config.stages)
    top = {name: config[name] for name in own if name in config}
    options = parse(RunOptions, top | {"sections": {}}, "")
    model = options.model
    kind = MODELS.get(model.make) if isinstance(model, ConfigDict) and "make" in model else None
    if kind is not None:
        model = parse(kind, model, "model")
        if model.dtype == "auto":
            dtype = default_dtype(platform or jax.default_backend())
            model = dataclasses.replace(model, dtype=dtype)
    elif not isinstance(model, ConfigDict) or "make" not in model:
        expected = "a section with the field `make`, 'package.module:function'"
        fail("model", model, expected)
    adapter = options.adapter
    if (adapter.kind, adapter.base) == ("lora", "auto"):
        # A model of one's own may not support it.
        int8 = kind is not None and options.rollout_quantisation.weights == "int8"
        adapter = dataclasses.replace(adapter, base="int8" if int8 else "exact")
    whole = dataclasses.replace(
        options, model=model, adapter=adapter, sections=types.MappingProxyType(sections)
    )
    whole.check_stages()
    return whole


def run_section(options: RunOptions) -> ConfigDict:
    """Converts `RunOptions` to a config. This is the inverse of `parse_run`."""
    config = section(options, omit=("sections",)).unlock()
    for name, stage in options.sections.items():
        config[name] = section(stage)
    return lock(config, options)
