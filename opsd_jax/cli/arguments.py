"""The command-line arguments. This module does not import JAX, so --help is fast."""

from __future__ import annotations

import argparse
import importlib.util
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import opsd_jax

OVERRIDE = "--config."

EPILOG = """\
examples:
  opsd-jax train --config quickstart --workdir runs/quickstart
  opsd-jax train --config quickstart --workdir runs/all --config.opsd.gate=all
  opsd-jax evaluate --workdir runs/quickstart --stage opsd --compare runs/quickstart/rlvr
  opsd-jax evaluate --model models/Qwen3-8B --benchmark math500 --benchmark aime24 --out runs/qwen3
  opsd-jax plan --config configs/qwen3_8b_opsd_v5p32.py --topology v5p:2x2x4
  opsd-jax report --workdir runs/quickstart
  opsd-jax convert --workdir runs/quickstart --stage opsd --out models/quickstart

exit codes: 0 done; 1 the run failed, or a planned run does not fit; 2 wrong arguments or config;
75, or 134 from JAX itself, a host was lost; 130 or 143 stopped by a signal, a checkpoint was saved.
After 75, 130, 134 and 143, run the same command on all hosts to resume from the last checkpoint.
"""
TRAIN = "Run the stages of a config, evaluate each, and write the report."
REPORT = "Write the report of a run again, from its records."
CONVERT = "Write the result of a stage, or a Hugging Face model, as a directory for transformers."
PLAN = "Compile a run for TPUs that are not attached; print its memory, traffic and time."
PLAN_EPILOG = """\
This takes minutes: XLA's compiler for TPUs (pip install 'opsd-jax[tpu]') compiles every program
of the run on this machine. It needs no TPU, data or weights if the config names a preset.
The exit code is 1 if the run does not fit. docs/pods.md explains the table.
"""
EVALUATE = "Evaluate the result of a stage, or a Hugging Face model, on held-out problems."
EVALUATE_EPILOG = """\
Without --benchmark, the default settings are those of the run. With --benchmark, they are those of
the paper: 8 responses per problem at temperature 0.6, top_p 0.95 and top_k 20, of up to 30,000
tokens, for prompts of up to 2,048 tokens, with 8 x data x fsdp decoding slots. To resume after a
stop or a crash, run the same command again. docs/evaluation.md explains every statistic.
"""


def parser(show_fields: bool = False) -> argparse.ArgumentParser:
    """Returns the parser for all arguments except `--config.FIELD=VALUE`.

    Args:
      show_fields: whether the help of `train` lists the fields of the config, which needs JAX.
    """
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(
        prog="opsd-jax",
        description="Post-train reasoning models: SFT, RLVR, on-policy self-distillation.",
        epilog=EPILOG,
        formatter_class=raw,
    )
    top.add_argument("--version", action="version", version=f"opsd-jax {opsd_jax.__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str, epilog: str = "") -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=text, description=text, epilog=epilog, formatter_class=raw
        )

    _add_train(command("train", TRAIN, _fields() if show_fields else ""))
    _add_evaluate(command("evaluate", EVALUATE, EVALUATE_EPILOG))
    _add_plan(command("plan", PLAN, PLAN_EPILOG))
    _add_report(command("report", REPORT))
    _add_convert(command("convert", CONVERT))
    return top


def _fields() -> str:
    """Returns the help text that lists the config fields."""
    from opsd_jax.config import fields  # needs JAX

    return fields.for_help()


def split_overrides(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Separates `--config.FIELD=VALUE` and `--config.FIELD VALUE` from the other arguments.

    Returns:
      The other arguments, and a dictionary from field to value.
    """
    rest, overrides, left = [], {}, list(argv)
    while left:
        argument = left.pop(0)
        if argument == "--mesh" and left:
            argument += f"={left.pop(0)}"  # argparse would read a value such as -1,1,1 as an option
        if not argument.startswith(OVERRIDE):
            rest.append(argument)
            continue
        field, equals, value = argument.removeprefix(OVERRIDE).partition("=")
        if not equals:
            if not left or left[0].startswith("--"):
                parser().error(f"{argument} has no value; expected {argument}=VALUE")
            value = left.pop(0)
        overrides[field] = value
    return rest, overrides


# Types of arguments.


def local(text: str) -> pathlib.Path:
    """Parses the path of a directory on this machine, and makes it absolute."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text} is a URL; expected a directory on this machine")
    return pathlib.Path(text).absolute()


def model(text: str) -> str:
    """Parses the directory of a model, which becomes absolute, or its name on the Hub."""
    from opsd_jax.storage import hub

    return text if hub.is_name(text, hub.MODEL) else str(local(text))


def directory(text: str) -> Any:
    """Parses the path of a directory on this machine or in a bucket (gs://BUCKET/...)."""
    if "://" not in text:
        return local(text)
    if not re.match("gs://[^/]", text):
        raise argparse.ArgumentTypeError(
            f"{text} is not supported; expected a directory or gs://BUCKET/..."
        )
    if importlib.util.find_spec("gcsfs") is None:
        raise argparse.ArgumentTypeError(f"{text} needs gcsfs; run pip install 'opsd-jax[gcs]'")
    import fsspec.config
    from etils import epath

    # Listings are not cached, because other hosts and earlier runs write to the directory too.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    return epath.Path(text)


def fork(text: str) -> tuple[Any, int | None]:
    """Parses a checkpoint of another run, RUN/STAGE or RUN/STAGE@STEP, as its path and its step."""
    path, at, step = text.rpartition("@") if "@" in text else (text, "", "")
    if at and not step.isdecimal():
        raise argparse.ArgumentTypeError(
            f"{text} is not RUN/STAGE@STEP; expected a number of steps"
        )
    return directory(path), int(step) if at else None


def mesh(text: str) -> tuple[int, ...]:
    """Parses the axis sizes of a mesh, such as "1,-1,1"."""
    return tuple(int(size) for size in text.split(","))


def count(text: str) -> int:
    """Parses an integer that must be at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is too small; expected 1 or more")
    return int(text)


def step(text: str) -> int:
    """Parses the number of a step, which must be at least 0."""
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative; expected a step, counted from 0")
    return int(text)


def fraction(text: str) -> float:
    """Parses a number that must be in (0, 1]."""
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is out of range; expected a fraction in (0, 1]")
    return float(text)


def package(text: str) -> str:
    """Parses the name of a top-level package."""
    if not text.isidentifier():
        raise argparse.ArgumentTypeError(f"{text} is not a package; expected a name such as mine")
    return text


# Arguments of each command.


def _add_workdir(sub: argparse._ActionsContainer, *, required: bool = True) -> None:
    sub.add_argument(
        "--workdir",
        required=required,
        type=directory,
        help="work directory of the run, or gs://BUCKET/...",
    )


def _add_trust(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--trust",
        action="append",
        default=[],
        type=package,
        metavar="PACKAGE",
        help="package that the config of the run in --workdir may import, beside opsd_jax; can be "
        "repeated",
    )


def _add_config(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--config",
        required=True,
        help="a Python file with get_config(), or a packaged config such as quickstart; "
        f"{OVERRIDE}FIELD=VALUE changes a field of it",
    )


def _add_hosts(sub: argparse.ArgumentParser) -> None:
    """Adds the arguments for a run with several processes."""
    sub.add_argument(
        "--coordinator",
        default="",
        metavar="HOST[:PORT]",
        help="address of the first of several hosts, all of which run this command; "
        "auto: the address that Cloud TPU or GKE provides",
    )
    sub.add_argument("--processes", type=count, help="number of processes, unless auto")
    sub.add_argument("--process", type=int, help="number of this process, from 0, unless auto")


def _add_model(sub: argparse.ArgumentParser, required: bool = True) -> None:
    """Adds the arguments that select a model: a stage of a run, or a model directory."""
    which = sub.add_mutually_exclusive_group(required=required)
    _add_workdir(which, required=False)
    which.add_argument(
        "--model",
        type=model,
        help="directory of a Hugging Face model, or its name on the Hub, OWNER/NAME[@REVISION]",
    )
    sub.add_argument("--stage", help="stage of the run (default: the last finished one)")
    _add_trust(sub)


def _add_report(sub: argparse.ArgumentParser) -> None:
    _add_workdir(sub)
    _add_trust(sub)


def _add_train(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--workdir",
        required=True,
        type=directory,
        help="work directory of the run, or gs://BUCKET/...; created if it does not exist, resumed "
        "if it holds a run",
    )
    sub.add_argument(
        "--fork",
        type=fork,
        metavar="RUN/STAGE[@STEP]",
        help="go on from this checkpoint of another run, with other options of the stage, such as "
        "more steps; --workdir gets copies",
    )
    sub.add_argument(
        "--profile",
        type=step,
        metavar="STEP",
        help="write a trace of this step of each stage, counted from 0, to "
        "WORKDIR/STAGE/profile/; XProf and TensorBoard show it",
    )
    _add_config(sub)
    _add_hosts(sub)


def _add_evaluate(sub: argparse.ArgumentParser) -> None:
    _add_model(sub, required=False)  # --adapter names its model
    _add_hosts(sub)
    add = sub.add_argument
    add(
        "--adapter",
        type=local,
        metavar="DIR",
        help="evaluate a model with the adapter in this directory, which is in the format of "
        "Hugging Face PEFT (default of --model: the model that its config names)",
    )
    add(
        "--benchmark",
        action="append",
        metavar="NAME[=PATH]",
        help="math500, aime24, aime25, gsm8k, or any name with a file; can be repeated "
        "(default: the run's held-out problems)",
    )
    add("--problems", type=int, help="first problems of each benchmark to take; 0: all")
    add("--samples", type=int, help="responses per problem")
    add("--temperature", type=float, help="sampling temperature; 0: greedy")
    add("--top-p", type=float, help="sample from the most likely tokens of this total probability")
    add("--top-k", type=int, help="sample from this many most likely tokens; 0: from all")
    add(
        "--min-p",
        type=float,
        help="sample from tokens with this fraction of the top probability; 0: from all",
    )
    add("--response-tokens", type=int, help="token budget of a response")
    add("--prompt-tokens", type=int, help="longest prompt, in tokens")
    add("--slots", type=int, help="decoding slots: responses sampled at the same time")
    add("--seed", type=int, help="seed of the sampling")
    add("--mesh", type=mesh, metavar="DATA,FSDP,TENSOR", help="sizes of the mesh axes")
    add("--thinking", choices=("on", "off"), help="thinking mode of the chat template")
    add("--system", help="system message of the chat")
    add("--prompt", help="user message, with {question} in it")
    add("--date", help="YYYY-MM-DD, for a chat template that asks for today's date")
    add(
        "--compare",
        type=directory,
        metavar="DIR",
        help="directory of an earlier evaluation, or of a stage: report the changes since then",
    )
    add(
        "--out",
        type=directory,
        help="directory of the evaluation (default: one in WORKDIR/evaluations)",
    )


def _add_plan(sub: argparse.ArgumentParser) -> None:
    _add_config(sub)
    sub.add_argument(
        "--topology",
        required=True,
        help="chips and their arrangement: v5e:4x4, v5p:2x2x4, v6e:8x8, ...",
    )
    sub.add_argument(
        "--slices",
        type=count,
        default=1,
        help="number of such topologies, connected by the data centre's network",
    )
    sub.add_argument(
        "--length",
        type=fraction,
        default=0.5,
        help="assumed mean length of responses, as a fraction of their budget "
        "(default: %(default)s)",
    )
    sub.add_argument("--json", action="store_true", help="print the plan as JSON")
    sub.add_argument(
        "--out", type=pathlib.Path, help="also write memory, programs and times to this text file"
    )
    sub.add_argument(
        "--executables",
        type=directory,
        help="also save the compiled programs in this directory, for config.executables of a run",
    )


def _add_convert(sub: argparse.ArgumentParser) -> None:
    _add_model(sub)
    sub.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="dtype of the weights (default: the dtype that they have in the source)",
    )
    sub.add_argument(
        "--adapter",
        action="store_true",
        help="write the stage's adapter in the format of Hugging Face PEFT (default: the model, to "
        "which the adapter has been added)",
    )
    sub.add_argument("--out", required=True, type=local, help="directory to write; new or empty")
