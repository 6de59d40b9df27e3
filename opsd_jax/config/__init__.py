"""The configuration of a run: every field with its default.

A config file has a function `get_config()` that starts from `default()` and changes what it needs;
the result is locked, so a field that does not exist is an error. On the command line,
`--config.opsd.gate=all` changes one more.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from typing import Any

from ml_collections import ConfigDict

from opsd_jax import losses
from opsd_jax.models.presets import PRESETS
from opsd_jax.models.rope import RopeScaling
from opsd_jax.options import ConfigError as ConfigError
from opsd_jax.options import import_function as import_function

SOURCES = ("train", "heldout", "exclude")  # the sections of `config.data` that hold them
REQUEST = "Please reason step by step, and put your final answer within \\boxed{}.\n"
# How models are run that are large: products in bfloat16; parameters in float32, since a step
# of 1e-6 is lost on a bfloat16 weight, which has 8 bits; activations computed again, not kept.
LARGE = {
    "dtype": "bfloat16",
    "param_dtype": "float32",
    "remat": "full",
    "sequence_parallel": False,
    "attention": "auto",
    "scan_unroll": 1,
    "cache": "auto",
}


def optimizer(**changes: Any) -> ConfigDict:
    """AdamW; each stage has its own."""
    config = ConfigDict()
    config.learning_rate = 2e-4
    config.schedule = "constant"  # after the warm-up: "constant", or "cosine" to the stage's end
    config.final_fraction = 0.1  # of the learning rate is left at the cosine's end
    config.warmup = 0  # updates over which the learning rate rises from zero
    config.b1 = 0.9
    config.b2 = 0.98
    config.weight_decay = 0.0
    # Of the first moment, "float32" or "bfloat16". The second has the parameters' own: in bfloat16
    # its steps of 1 - b2 would be lost.
    config.moment_dtype = "float32"
    config.clip_norm = 1.0  # the gradient's global norm is cut to this
    config.update(changes)
    return config


def objective(preset: str, **changes: Any) -> ConfigDict:
    """The parts of a policy-gradient algorithm, one of `opsd_jax.losses.PRESETS`, with changes."""
    return ConfigDict(losses.PRESETS[preset]._asdict() | changes)


def distillation(**changes: Any) -> ConfigDict:
    """The options of `opsd_jax.losses.OPSD` but for the gate, with changes."""
    options = losses.OPSD()._asdict()
    del options["gate"]  # a field of the stage itself
    return ConfigDict(options | changes)


def verifier(kind: str = "maths", **changes: Any) -> ConfigDict:
    """Who judges the responses to a source's problems; the kinds: opsd_jax/verify/verifiers.py."""
    config = ConfigDict()
    config.kind = kind
    config.answer = ("boxed",)  # where the answer stands: conventions, tried in this order
    config.ignore_case = False  # of "exact"
    config.relative_tolerance = 1e-6  # of "numeric", as the next
    config.absolute_tolerance = 0.0
    config.lock()
    config.update(changes)
    return config


def source(path: str | pathlib.Path = "", **changes: Any) -> ConfigDict:
    """A file or folder of problems, with changes: `source("a.jsonl", columns={"answer": "gold"})`.

    docs/data.md has an example of each field.
    """
    config = ConfigDict()
    # .jsonl, .jsonl.gz, .parquet, .arrow, or a folder of Hugging Face's.
    config.path = os.fspath(path)
    config.split = ""  # of a folder with several
    config.columns = ConfigDict()  # names of columns; a dot leads into an object: "reward.answer"
    config.columns.id = "id"  # where there is none, the row's number
    config.columns.question = "problem"
    config.columns.answer = "answer"  # "" for none
    config.columns.solution = "solution"  # where there is none, ""
    config.answer_after = ""  # the answer is what follows the last of this in its column: "####"
    config.extra = ()  # further columns that the verifier needs, kept in Problem.extra
    config.weight = 1.0  # of training sources: the share of the problems that come from this one
    config.verifier = verifier()
    config.difficulty = ConfigDict()
    config.difficulty.column = ""  # keep only rows with a value in [low, high]; "" keeps all
    config.difficulty.low = -float("inf")
    config.difficulty.high = float("inf")
    config.pass_rates = ConfigDict()
    config.pass_rates.path = ""  # of earlier rollouts: keep problems solved in [low, high] of them
    config.pass_rates.low = 0.0
    config.pass_rates.high = 1.0
    config.bad_rows = "refuse"  # or "drop": leave them out, and say so
    config.lock()
    config.update(changes)
    return config


def decoder(**changes: Any) -> ConfigDict:
    """The section `model` of the reference decoder; by default the quickstart's sizes."""
    config = ConfigDict()
    # "package.module:function", which takes this section and returns an opsd_jax.policy.Model.
    config.make = "opsd_jax.models.decoder:from_config"
    config.vocab_size = 32
    config.hidden_size = 64
    config.intermediate_size = 176
    config.num_layers = 3
    config.num_heads = 4
    config.num_kv_heads = 2
    config.head_dim = 16
    config.rope_theta = 1000.0
    config.rope_scaling = rope_scaling()
    config.rms_norm_eps = 1e-6
    config.qk_norm = True  # normalise queries and keys, as Qwen3 does
    config.attention_bias = False  # of queries, keys and values: Qwen2.5 has them
    config.tie_word_embeddings = False
    config.dtype = "float32"  # of activations and products: "float32" or "bfloat16"
    config.param_dtype = "float32"
    # What each layer keeps for the backward pass; the rest is computed again. "none": everything is
    # kept; "full": its input alone; "attention": also what splash attention gave; "products": also
    # the results of all products.
    config.remat = "none"
    # Between layers, tokens lie over `tensor`: activations take so much less memory (Megatron-LM,
    # arXiv 2205.05198). Padded lengths are multiples of it then.
    config.sequence_parallel = False
    # Of whole rows: "dense"; "splash", for TPUs: nothing of [T, T] is made, positions ascend along
    # a row, and what goes into a cache begins it; "auto" is that on a TPU, if its kernel takes the
    # head's size.
    config.attention = "auto"
    config.scan_unroll = 3  # layers a turn of the scan over layers; divides num_layers
    # Of keys and values: "dense"; "paged", for TPUs: decoding reads what is filled; "auto" is that
    # on a TPU, if its kernel takes the model's sizes.
    config.cache = "auto"
    config.lock()
    config.update(changes)
    return config


def preset(name: str, **changes: Any) -> ConfigDict:
    """The reference decoder in the sizes of a released model, with random initial parameters.

    Args:
      name: one of `opsd_jax.models.presets.PRESETS`.
      changes: fields of `decoder` -> values.

    Raises:
      ConfigError: there is no such preset (lists those that there are).
    """
    if name not in PRESETS:
        raise ConfigError(f"there is no preset {name!r}; expected one of {', '.join(PRESETS)}.")
    return decoder(**{**LARGE, **PRESETS[name], **changes})


def pretrained(path: str | pathlib.Path = "", preset: str = "", **changes: Any) -> ConfigDict:
    """The section `model` of a directory with a Hugging Face `config.json` and safetensors files.

    Args:
      path: the directory; `--config.model.path` says it as well.
      preset: whose sizes `opsd-jax plan` takes where there is no path.
      changes: its other fields -> values.
    """
    config = ConfigDict()
    config.make = "opsd_jax.models.pretrained:from_config"
    config.path = os.fspath(path)
    config.preset = preset
    config.update(LARGE)
    config.lock()
    config.update(changes)
    return config


def rope_scaling(**changes: Any) -> ConfigDict:
    """How rotary angles are scaled to a longer context; the fields are those of
    `opsd_jax.models.rope.RopeScaling`.
    """
    config = ConfigDict(dataclasses.asdict(RopeScaling()))
    config.update(changes)
    return config


def default() -> ConfigDict:
    """The embedded task and a decoder of 0.1 million parameters: the quickstart, stage by stage."""
    config = ConfigDict()
    config.seed = 0
    # The stages, in order. Each is the name of a section below with an `algorithm`.
    config.stages = ("sft", "rlvr", "opsd")
    # Sizes of (data, fsdp, tensor); -1 takes the devices that are left.
    config.mesh = (-1, 1, 1)
    # The same devices, as sampling sees them: weights are cut over `tensor` alone then, rollouts
    # over the others. () is `mesh`.
    config.decode_mesh = ()
    # "package.module:function", which takes the section `data` and returns an
    # opsd_jax.data.task.Task: "opsd_jax.data.text:task" reads files.
    config.task = "opsd_jax.data.arithmetic:task"

    config.data = ConfigDict()
    # Sources by name, each a `source(...)`; no name stands in two of the three.
    config.data.train = ConfigDict()
    config.data.heldout = ConfigDict()
    config.data.exclude = ConfigDict()  # not trained on, as the held-out ones: other evaluations
    # With no `heldout` source, so many problems of `train` are held out, the same ones every time.
    config.data.heldout_problems = 0
    # A directory with a tokenizer.json, or "package.module:function", called without arguments.
    # "" is the model's directory, `model.path`.
    config.data.tokenizer = "opsd_jax.data.tokenizer:ByteTokenizer"
    config.data.chat_template = ""  # the tokenizer's own; "none": plain text; or a file's name
    config.data.thinking = ""  # "on", "off", or what the chat template does by itself
    config.data.system = ""  # the system's turn; "" for none
    config.data.date = ""  # "YYYY-MM-DD", for chat templates that ask which day it is
    config.data.template_options = ConfigDict()  # further variables of the chat template
    # What the user says. {question} is filled in.
    config.data.prompt = "{question}\n" + REQUEST
    # What the user says to the teacher: {context} as well, in the words of its kind.
    config.data.teacher_prompt = "{question}\n\n{context}\n\n" + REQUEST
    config.data.contexts = ConfigDict()
    config.data.contexts.solution = "Here is a reference solution:\n{context}"
    config.data.contexts.answer = "The correct final answer is {context}."
    config.data.contexts.sibling = "Here is a correct solution:\n{context}"
    config.data.contexts.concise = (
        "Think as briefly as you can: go straight at the answer, take each step once, and leave "
        "out whatever the solution does not need."
    )
    config.data.contexts.memo = (
        "You have worked on problems like this one, and recall:\n{context}\n"
        "Use it to solve the problem correctly and without detours."
    )
    config.data.contexts.column = "{context}"
    # A context as a thought in the middle of a response (opsd.reinject_every); {context} as above.
    config.data.reminder = "\n\nWait, I recall this. {context}\n\n"
    # How the model is asked for a memo on its response; {answer} and {solution} are filled in.
    config.data.memo = ConfigDict()
    config.data.memo.correct = (
        "That is right: the answer is {answer}. Write a short memo for solving problems like this "
        "one: the key insight, and the most direct way to the answer. Write the memo alone."
    )
    config.data.memo.incorrect = (
        "That is wrong: the answer is {answer}. Write a short memo for solving problems like this "
        "one: the key insight, where the attempt went wrong, and how one notices. Write the memo "
        "alone."
    )
    config.data.memo.truncated = (
        "You ran out of room; the answer is {answer}. Write a short memo for solving problems like "
        "this one: the key insight, and a more direct way to the answer. Write the memo alone."
    )

    config.model = decoder()

    config.sft = ConfigDict()
    config.sft.algorithm = "sft"
    config.sft.init_from = ""  # stage to start from; "" is fresh parameters
    config.sft.steps = 1300
    config.sft.batch_size = 32  # demonstrations a step
    config.sft.microbatch = 32  # rows computed at once
    # Padded lengths of prompt and response, less the last token: one program has them all.
    config.sft.buckets = (56, 80, 128)
    config.sft.loss_chunk = 0  # tokens whose logits are made at once, on a device; 0: as fits
    config.sft.checkpoint_every = 100  # steps
    config.sft.optimizer = optimizer(
        learning_rate=3e-3, schedule="cosine", warmup=50, weight_decay=0.01
    )

    config.rlvr = ConfigDict()
    config.rlvr.algorithm = "rlvr"
    config.rlvr.init_from = "sft"
    config.rlvr.steps = 40
    config.rlvr.prompts = 32  # problems a step
    config.rlvr.group_size = 8  # rollouts a problem
    config.rlvr.slots = 128  # rollouts in the making at once, on all devices
    # Rounds that may roll out other problems where a step's leave less to train on than it could
    # have (DAPO's dynamic sampling), given objective.drop_uninformative.
    config.rlvr.resample_rounds = 0
    config.rlvr.temperature = 1.0
    config.rlvr.prompt_tokens = 16  # the longest prompt
    config.rlvr.response_tokens = 88  # the budget of a response; one that fills it is truncated
    config.rlvr.updates = 2  # optimiser updates a step, on equal parts of its rollouts
    config.rlvr.microbatch = 32
    config.rlvr.buckets = (64, 103)  # as sft.buckets
    config.rlvr.loss_chunk = 0
    # The algorithm, by its parts; every field is explained at opsd_jax.losses.PolicyGradient.
    config.rlvr.objective = objective("grpo", kl_coefficient=0.0, aggregation="token")
    config.rlvr.overlong_buffer = 0  # tokens before the budget where DAPO's punishment begins
    config.rlvr.overlong_factor = 1.0  # the punishment at the budget
    config.rlvr.checkpoint_every = 10
    config.rlvr.optimizer = optimizer()

    config.opsd = ConfigDict()
    config.opsd.algorithm = "opsd"
    config.opsd.init_from = "rlvr"
    config.opsd.steps = 25
    # What trains: "correct", "incorrect" (truncated ones too), "all", or three weights for correct,
    # incorrect and truncated rollouts, such as "1,0.5,0".
    config.opsd.gate = "correct"
    config.opsd.prompts = 256
    config.opsd.group_size = 1
    config.opsd.slots = 128
    # Rounds that may roll out other problems where a step's leave less to train on than it could
    # have (DAPO's dynamic sampling).
    config.opsd.resample_rounds = 0
    config.opsd.temperature = 1.0
    config.opsd.prompt_tokens = 16
    # What the teacher sees, by kind (opsd_jax/data/contexts.py): the first that a rollout has.
    config.opsd.contexts = ("solution",)
    config.opsd.sibling = "shortest"  # which correct sibling: "shortest" or "first"
    config.opsd.sibling_thinking = False  # show its thinking, too
    config.opsd.context_column = ""  # of "column": one of the sources' `extra`
    config.opsd.memo = ConfigDict()
    config.opsd.memo.request_tokens = 256  # the longest request for a memo
    config.opsd.memo.tokens = 1024  # the budget of a memo, its thinking included
    config.opsd.memo.close_tokens = 256  # more, where it has not ended its thinking by then
    config.opsd.memo.slots = 32  # memos in the making at once
    config.opsd.memo.temperature = 1.0
    config.opsd.reinject_every = 0  # tokens between reminders in the teacher's copy of a response
    config.opsd.reminder_tokens = 256  # a longer reminder loses the end of its context
    # A longer prompt with privileged text in it loses the end of that text.
    config.opsd.teacher_prompt_tokens = 39
    config.opsd.teacher = ConfigDict()
    # "frozen", "ema", "refresh", "trust_region" or "live" (opsd_jax/stages/teacher.py).
    config.opsd.teacher.kind = "frozen"
    config.opsd.teacher.rate = 0.05  # of "ema", and the current model's share in "trust_region"
    config.opsd.teacher.every = 50  # of "refresh": updates between two copies
    config.opsd.response_tokens = 88
    config.opsd.max_rows = 64  # train on the first so many that the gate keeps; 0 for all
    config.opsd.microbatch = 16
    config.opsd.buckets = (56, 103)  # as sft.buckets
    # The same with the teacher's prompt, one for each of these; (): teacher_prompt_tokens more.
    config.opsd.teacher_buckets = (80, 126)
    config.opsd.loss_chunk = 0
    # The divergence and what weighs it; every field is explained at opsd_jax.losses.OPSD.
    config.opsd.loss = distillation()
    config.opsd.checkpoint_every = 5
    config.opsd.optimizer = optimizer()

    config.evaluation = ConfigDict()
    config.evaluation.problems = 512  # held-out ones; 0 for all
    config.evaluation.samples = 4  # responses a problem
    config.evaluation.temperature = 1.0
    config.evaluation.top_k = 0  # sample from the likeliest so many words; 0: from all
    config.evaluation.top_p = 1.0  # of these from the fewest likeliest with this mass; 1: from all
    config.evaluation.min_p = 0.0  # of these from those at least so likely, the likeliest being 1
    config.evaluation.slots = 256
    config.evaluation.prompt_tokens = 16
    config.evaluation.response_tokens = 88
    config.evaluation.seed = 0

    config.pool = ConfigDict()  # the processes that judge responses
    config.pool.workers = 0  # how many; 0: a core each, at most 8
    config.pool.seconds = 2.0  # for a response; then its worker is killed and it counts as wrong
    config.pool.memory_mb = 512  # MiB for a response; Linux only

    config.checkpoints = ConfigDict()  # which of a stage's checkpoints stay
    config.checkpoints.last = 2  # so many of the newest
    config.checkpoints.period = 0  # and those of steps that are multiples of it; 0 for none
    # And the one with the largest metric of this name, such as "reward", or the smallest of
    # "-length"; "" for none.
    config.checkpoints.best = ""

    config.max_nonfinite = 10  # steps in a row with a gradient that is not finite end the run
    config.wandb_project = ""  # "" for none; needs the extra `wandb`
    config.lock()
    for part in (*SOURCES, "template_options"):
        config.data[part].unlock()  # until the config is loaded
    return config
