"""The command line: `opsd-jax train | evaluate | report`."""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
from collections.abc import Sequence

OVERRIDE = "--config."

EPILOG = """\
examples:
  opsd-jax train --config configs/quickstart.py --workdir runs/quickstart
  opsd-jax train --config configs/quickstart.py --workdir runs/all --config.opsd.gate=all
  opsd-jax evaluate --workdir runs/quickstart --stage rlvr
  opsd-jax report --workdir runs/quickstart

exit codes: 0 done; 1 the run failed; 2 bad usage or config; 130 or 143 stopped by a signal with a
checkpoint saved: the same command goes on from there.
"""


def fields() -> str:
    """The fields of a config with their defaults, a line each."""
    from opsd_jax import config as config_lib

    flat = config_lib.flatten(config_lib.default())
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
        sub = commands.add_parser(
            name, help=text, description=text, epilog=epilog, formatter_class=raw
        )
        sub.add_argument(
            "--workdir",
            required=True,
            type=pathlib.Path,
            help="directory of the run; made if need be, gone on with if it holds one",
        )
        return sub

    train = command(
        "train",
        "Run the stages of a config, evaluate each, and write the report.",
        fields() if show_fields else "",
    )
    train.add_argument(
        "--config",
        required=True,
        help=f"a Python file with get_config(); {OVERRIDE}FIELD=VALUE changes a field of it",
    )
    evaluate = command("evaluate", "Evaluate the result of a finished stage once more.")
    evaluate.add_argument("--stage", help="the stage (default: the last that is finished)")
    evaluate.add_argument("--problems", type=int, help="held-out problems (default: the config's)")
    evaluate.add_argument("--samples", type=int, help="responses to each (default: the config's)")
    evaluate.add_argument("--seed", type=int, help="of the sampling (default: the config's)")
    command("report", "Write the report of a run again, from its records.")
    return top


def split_overrides(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Takes `--config.a.b=value` and `--config.a.b value` out of the arguments."""
    rest, overrides, words = [], {}, list(argv)
    while words:
        word = words.pop(0)
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
    if overrides and arguments.command != "train":
        parser().error(f"{arguments.command} takes the run's own config, without {OVERRIDE}…")

    # Imported late: --help and a wrong argument need no JAX.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
    from opsd_jax import config as config_lib
    from opsd_jax import pipeline, workdir
    from opsd_jax.data.problem import DataError
    from opsd_jax.training.files import RecordError, to_json
    from opsd_jax.training.interrupt import Interrupted
    from opsd_jax.training.loop import Diverged
    from opsd_jax.verify.pool import PoolError

    sys.path.append(os.getcwd())  # a task or a model of the user's own may lie there
    directory = arguments.workdir.absolute()
    try:
        if arguments.command == "train":
            config = config_lib.load(arguments.config, overrides)
            pipeline.run(config, directory)
        else:
            config = workdir.config_of(directory)
        if arguments.command == "evaluate":
            changes = {name: getattr(arguments, name) for name in ("problems", "samples", "seed")}
            figures = pipeline.evaluate_again(config, directory, arguments.stage, changes)
            print(to_json(figures, indent=2))
        else:
            print(f"report: {pipeline.write_report(config, directory)}")
        return 0
    except Interrupted as stop:
        print(f"opsd-jax: {stop}: saved; the same command goes on from here.", file=sys.stderr)
        return stop.exit_code
    except (config_lib.ConfigError, DataError) as error:
        print(f"opsd-jax: {error}", file=sys.stderr)
        return 2
    except (RecordError, Diverged, PoolError) as error:
        print(f"opsd-jax: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
