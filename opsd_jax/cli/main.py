"""The command line: `opsd-jax train | evaluate | plan | report | convert`."""

from __future__ import annotations

import argparse
import importlib.util
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Sequence
from typing import Any

OVERRIDE = "--config."
LOST = 75  # exit code: EX_TEMPFAIL, try again

EPILOG = """\
examples:
  opsd-jax train --config configs/quickstart.py --workdir runs/quickstart
  opsd-jax train --config configs/quickstart.py --workdir runs/all --config.opsd.gate=all
  opsd-jax evaluate --workdir runs/quickstart --stage opsd --compare runs/quickstart/rlvr
  opsd-jax evaluate --model models/Qwen3-8B --benchmark math500 --benchmark aime24 --out runs/qwen3
  opsd-jax plan --config configs/qwen3_8b_opsd_v5p32.py --topology v5p:2x2x4
  opsd-jax report --workdir runs/quickstart
  opsd-jax convert --workdir runs/quickstart --stage opsd --out models/quickstart

exit codes: 0 done; 1 the run failed, or a planned one does not fit; 2 bad usage or config; 75, or
134 from JAX itself, one of several hosts is lost; 130 or 143 stopped by a signal with a checkpoint
saved. After 75, 130, 134 and 143 the same command, on all hosts, goes on from the last checkpoint.
"""

CONVERT = "Write the result of a stage, or a Hugging Face model anew, for transformers to load."
PLAN = "Compile a run for TPUs that are not there: does it fit, what does it move, how long?"
PLAN_EPILOG = """\
Takes minutes: XLA's compiler for TPUs (pip install 'opsd-jax[tpu]') compiles every program of the
run on this machine, which needs no TPU, no data and no weights: configs that name a preset take its
sizes. Exit code 1 where the run does not fit. docs/pods.md explains the table.
"""
EVALUATE = "Evaluate the result of a stage, or a Hugging Face model, on held-out problems."
EVALUATE_EPILOG = """\
Without --benchmark all settings are the run's. With it they are those of the paper that are not
given: 8 responses to each problem at temperature 0.6, top_p 0.95, top_k 20, of up to 30,000 tokens,
to prompts of up to 2,048; 8 x data x fsdp at once. Stopped or killed, the same command goes on.
docs/evaluation.md explains every figure.
"""


def fields() -> str:
    """The fields of a config with their defaults, a line each."""
    from opsd_jax import config as config_lib
    from opsd_jax.config import loading as config_files

    flat = config_files.flatten(config_lib.default())
    on_a_line = lambda value: str(value).replace("\n", r"\n")
    lines = [f"  {OVERRIDE}{field}={on_a_line(value)}" for field, value in flat.items()]
    return "fields and their defaults (opsd_jax/config.py says what each does):\n" + "\n".join(
        lines
    )


def parser(show_fields: bool = False) -> argparse.ArgumentParser:
    """The arguments, but for the `--config.field=value` ones; their list goes into train's help."""
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(
        prog="opsd-jax",
        description="Post-train reasoning models: SFT, RLVR, on-policy self-distillation.",
        epilog=EPILOG,
        formatter_class=raw,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str, epilog: str = "") -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=text, description=text, epilog=epilog, formatter_class=raw
        )

    workdir: dict[str, Any] = {
        "type": directory,
        "help": "directory of the run, or gs://BUCKET/...",
    }

    train = command(
        "train",
        "Run the stages of a config, evaluate each, and write the report.",
        fields() if show_fields else "",
    )
    more = "; made if need be, gone on with if it holds one"
    train.add_argument("--workdir", required=True, type=directory, help=workdir["help"] + more)
    train.add_argument(
        "--config",
        required=True,
        help=f"a Python file with get_config(); {OVERRIDE}FIELD=VALUE changes a field of it",
    )
    _add_hosts(train)
    _add_evaluate(command("evaluate", EVALUATE, EVALUATE_EPILOG), workdir)
    _add_plan(command("plan", PLAN, PLAN_EPILOG))
    report = command("report", "Write the report of a run again, from its records.")
    report.add_argument("--workdir", required=True, **workdir)
    _add_convert(command("convert", CONVERT), workdir)
    return top


def _add_hosts(sub: argparse.ArgumentParser) -> None:
    """The arguments that make a process one of several."""
    sub.add_argument(
        "--coordinator",
        default="",
        metavar="HOST[:PORT]",
        help="of the first of several hosts, all of which run this command; auto: as Cloud TPU or "
        "GKE says",
    )
    sub.add_argument("--processes", type=count, help="how many, unless auto")
    sub.add_argument("--process", type=int, help="which of them this is, from 0 on, unless auto")


def local(text: str) -> pathlib.Path:
    """An absolute path."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text}; expected a directory of this machine")
    return pathlib.Path(text).absolute()


def directory(text: str) -> Any:
    """An absolute path, or one in a bucket."""
    if "://" not in text:
        return local(text)
    if not re.match("gs://[^/]", text):
        raise argparse.ArgumentTypeError(f"{text}; expected a directory or gs://BUCKET/...")
    if importlib.util.find_spec("gcsfs") is None:
        raise argparse.ArgumentTypeError(f"{text} needs an extra: pip install 'opsd-jax[gcs]'")
    import fsspec.config
    from etils import epath

    # Other hosts, and runs before this one, write there too.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    return epath.Path(text)


def mesh(text: str) -> tuple[int, ...]:
    """Sizes of the mesh: "1,-1,1"."""
    return tuple(int(size) for size in text.split(","))


def _add_model(sub: argparse.ArgumentParser, workdir: dict[str, Any]) -> None:
    """The arguments that say which model: of a run's stage, or in a directory."""
    whose = sub.add_mutually_exclusive_group(required=True)
    whose.add_argument("--workdir", **workdir)
    whose.add_argument("--model", type=local, help="directory of a Hugging Face model")
    sub.add_argument("--stage", help="of the run (default: the last that is finished)")


def _add_evaluate(sub: argparse.ArgumentParser, workdir: dict[str, Any]) -> None:
    """The arguments of `evaluate`."""
    _add_model(sub, workdir)
    _add_hosts(sub)
    sub.add_argument(
        "--benchmark",
        action="append",
        metavar="NAME[=PATH]",
        help="math500, aime24, aime25, gsm8k, or any name with a file; may be given several times "
        "(default: the run's held-out problems)",
    )
    sub.add_argument("--problems", type=int, help="the first so many, of each benchmark; 0: all")
    sub.add_argument("--samples", type=int, help="responses to each problem")
    sub.add_argument("--temperature", type=float, help="0 for greedy")
    sub.add_argument("--top-p", type=float, help="sample from the likeliest words of this mass")
    sub.add_argument("--top-k", type=int, help="sample from so many likeliest words; 0: from all")
    sub.add_argument(
        "--min-p", type=float, help="of these from those at least so likely; 0: from all"
    )
    sub.add_argument("--response-tokens", type=int, help="the budget of a response")
    sub.add_argument("--prompt-tokens", type=int, help="the longest prompt")
    sub.add_argument("--slots", type=int, help="responses in the making at once, on all devices")
    sub.add_argument("--seed", type=int, help="of the sampling")
    sub.add_argument("--mesh", type=mesh, metavar="DATA,FSDP,TENSOR", help="sizes of the mesh")
    sub.add_argument("--thinking", choices=("on", "off"), help="of the chat template")
    sub.add_argument("--system", help="the system's turn of a chat")
    sub.add_argument("--prompt", help="what the user says, with {question} in it")
    sub.add_argument("--date", help="YYYY-MM-DD, for a chat template that asks which day it is")
    sub.add_argument(
        "--compare",
        type=directory,
        metavar="DIR",
        help="of an earlier evaluation, or of a stage: tell what changed since",
    )
    sub.add_argument(
        "--out",
        type=directory,
        help="directory of the evaluation (default: one in WORKDIR/evaluations)",
    )


def count(text: str) -> int:
    """A whole number, 1 at least."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}; expected 1 or more")
    return int(text)


def share(text: str) -> float:
    """A number in (0, 1]."""
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text}; expected a share above 0, at most 1")
    return float(text)


def _add_plan(sub: argparse.ArgumentParser) -> None:
    """The arguments of `plan`."""
    sub.add_argument(
        "--config",
        required=True,
        help=f"a Python file with get_config(); {OVERRIDE}FIELD=VALUE changes a field of it",
    )
    sub.add_argument(
        "--topology", required=True, help="chips by their shape: v5e:4x4, v5p:2x2x4, v6e:8x8, ..."
    )
    sub.add_argument(
        "--slices",
        type=count,
        default=1,
        help="so many of it, connected by the data centre's network",
    )
    sub.add_argument(
        "--length",
        type=share,
        default=0.5,
        help="of responses, as a share of their budget, for the times (default: %(default)s)",
    )
    sub.add_argument("--json", action="store_true", help="print the figures as JSON")
    sub.add_argument(
        "--out", type=pathlib.Path, help="also write memory, programs and times to this text file"
    )


def _add_convert(sub: argparse.ArgumentParser, workdir: dict[str, Any]) -> None:
    """The arguments of `convert`."""
    _add_model(sub, workdir)
    sub.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights (default: as they were where they came from)",
    )
    sub.add_argument("--out", required=True, type=local, help="directory to write, a new one")


def split_overrides(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Takes `--config.a.b=value` and `--config.a.b value` out of the arguments."""
    rest, overrides, words = [], {}, list(argv)
    while words:
        word = words.pop(0)
        if word == "--mesh" and words:
            word += f"={words.pop(0)}"  # that of -1,1,1 is no option
        if not word.startswith(OVERRIDE):
            rest.append(word)
            continue
        field, equals, value = word.removeprefix(OVERRIDE).partition("=")
        if not equals:
            if not words or words[0].startswith("--"):
                parser().error(f"{word} needs a value")
            value = words.pop(0)
        overrides[field] = value
    return rest, overrides


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    rest, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    wants_help = rest[:1] == ["train"] and not {"-h", "--help"}.isdisjoint(rest)
    arguments = parser(show_fields=wants_help).parse_args(rest)
    if overrides and arguments.command not in ("train", "plan"):
        parser().error(f"{arguments.command} takes the run's own config, without {OVERRIDE}…")

    # Imported late: --help and a wrong argument need no JAX.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
    if arguments.command == "plan":
        os.environ["JAX_PLATFORMS"] = "cpu"  # libtpu compiles, and looks for no TPU
    from opsd_jax.parallel import hosts

    sys.path.append(os.getcwd())  # a task or a model of the user's own may lie there
    if arguments.command in ("train", "evaluate"):
        try:
            hosts.start(arguments.coordinator, arguments.processes, arguments.process)
        except ValueError as error:
            parser().error(str(error))
    try:
        code = _run(arguments, overrides)
    except BaseException as error:
        if hosts.count() > 1:
            traceback.print_exc()
            hosts.leave(130 if isinstance(error, KeyboardInterrupt) else 1)
        raise
    if code:
        hosts.leave(code)
    return code


def _run(arguments: argparse.Namespace, overrides: dict[str, str]) -> int:
    """Runs the command that was asked for, and tells what it comes to; returns the exit code."""
    from opsd_jax import config as config_lib
    from opsd_jax.cli import convert
    from opsd_jax.cli import evaluate as benchmark
    from opsd_jax.config import loading as config_files
    from opsd_jax.parallel import hosts
    from opsd_jax.planning import plan, plan_file, table
    from opsd_jax.planning.chips import PlanError
    from opsd_jax.problem import DataError
    from opsd_jax.run import pipeline, workdir
    from opsd_jax.storage import files
    from opsd_jax.storage.files import RecordError, to_json
    from opsd_jax.training.loop import Diverged
    from opsd_jax.training.signals import Interrupted
    from opsd_jax.verify.pool import PoolError

    given = [path for name in ("workdir", "out") if (path := getattr(arguments, name, None))]
    try:
        if arguments.command == "evaluate":
            figures = benchmark.run(arguments)
            if hosts.is_first():
                print(to_json(figures, indent=2))
                print(f"report: {figures['directory']}/index.html", file=sys.stderr)
            return 0
        if arguments.command == "plan":
            figures = plan.run(arguments, overrides)
            if arguments.out:
                plan_file.write(arguments, overrides, figures)
            made = [to_json(figures, indent=2)] if arguments.json else table.lines(figures)
            print(*made, sep="\n")
            return 0 if figures["fits"] else 1
        if arguments.command == "convert":
            convert.run(arguments)
            print(f"model: {arguments.out}")
            return 0
        if arguments.command == "train":
            config = hosts.together(lambda: config_files.load(arguments.config, overrides))
            pipeline.run(config, arguments.workdir)
        else:
            config = workdir.config_of(arguments.workdir)
        path = hosts.from_first(lambda: pipeline.write_report(config, arguments.workdir))
        if hosts.is_first():
            print(f"report: {path}")
        return 0
    except Interrupted as stop:
        print(f"opsd-jax: {stop}: saved; the same command goes on from here.", file=sys.stderr)
        return stop.exit_code
    except (config_lib.ConfigError, DataError, PlanError) as error:
        print(f"opsd-jax: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        if hosts.is_loss(error):
            reason = f"another host is lost ({files.reason(error)})"
            then = "the same command on all of them goes on from the last checkpoint"
            print(f"opsd-jax: {reason}: {then}.", file=sys.stderr)
            return LOST
        if isinstance(error, RecordError | Diverged | PoolError):
            print(f"opsd-jax: {error}", file=sys.stderr)
            return 1
        # The disk is full, or is gone; or the bucket.
        in_bucket = any(map(files.in_bucket, given)) and (
            isinstance(error, OSError) or files.is_of_bucket(error)
        )
        if not in_bucket and not (isinstance(error, OSError) and error.strerror):
            raise
        # A write that fails does not say to which file.
        where = getattr(error, "filename", None) or (given[0] if given else "a file")
        why = getattr(error, "strerror", None) or files.reason(error)
        print(
            f"opsd-jax: {where} cannot be used: {why}. What is done is kept: once that is mended, "
            "the same command goes on.",
            file=sys.stderr,
        )
        return 1


if __name__ == "__main__":
    sys.exit(main())
