"""The command line: `opsd-jax train | evaluate | plan | report | convert`."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Mapping, Sequence

from opsd_jax.cli.arguments import OVERRIDE, parser, split_overrides

LOST = 75  # exit code EX_TEMPFAIL: try again


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one `opsd-jax` command and returns its exit code."""
    try:
        return _main(argv)
    except KeyboardInterrupt:  # while a stage trains, a signal saves a checkpoint instead
        say("interrupted. Finished work is kept; run the same command again to resume.")
        return 130


def _main(argv: Sequence[str] | None) -> int:
    """Parses the arguments, joins the other hosts, and runs the command."""
    rest, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    wants_help = rest[:1] == ["train"] and not {"-h", "--help"}.isdisjoint(rest)
    arguments = parser(show_fields=wants_help).parse_args(rest)
    if overrides and arguments.command not in ("train", "plan"):
        parser().error(
            f"{arguments.command} uses the saved config of a run; expected no {OVERRIDE}FIELD"
        )
    if arguments.command == "evaluate" and not (
        arguments.workdir or arguments.model or arguments.adapter
    ):
        parser().error("evaluate has no model; expected --workdir, --model or --adapter")
    _log_to_stderr()

    # Imported here, because --help and usage errors need no JAX.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
    if arguments.command == "plan":
        os.environ["JAX_PLATFORMS"] = "cpu"  # libtpu compiles without looking for a TPU
    from opsd_jax.parallel import hosts

    sys.path.append(os.getcwd())  # the user's task or model may be there
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


def _log_to_stderr() -> None:
    """Sends log messages to standard error as plain lines: the package's, and others' warnings.

    The root logger gets the handler. While it had none, the first call of `logging.warning` in
    any package would give it one that repeats every message.
    """
    root = logging.getLogger()
    if not any(isinstance(handler, _Handler) for handler in root.handlers):
        handler = _Handler()
        handler.setFormatter(_Formatter("%(message)s"))
        root.addHandler(handler)
    logging.getLogger("opsd_jax").setLevel(logging.INFO)


class _Handler(logging.StreamHandler):
    """Writes log messages to the current `sys.stderr`, above the progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a record."""
        import tqdm

        self.stream = sys.stderr
        with tqdm.tqdm.external_write_mode(file=self.stream):
            super().emit(record)


class _Formatter(logging.Formatter):
    """Formats log messages without control characters that a file or a model wrote."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the text of a record."""
        from opsd_jax.storage.foreign import message

        return message(super().format(record))


def _run(arguments: argparse.Namespace, overrides: Mapping[str, str]) -> int:
    """Runs a command and returns its exit code. For an expected error, prints a message."""
    from opsd_jax.options import ConfigError
    from opsd_jax.parallel import hosts
    from opsd_jax.planning.chips import PlanError
    from opsd_jax.problem import DataError
    from opsd_jax.storage import files
    from opsd_jax.storage.files import RecordError
    from opsd_jax.training.loop import Diverged, NoSignal
    from opsd_jax.training.signals import Interrupted
    from opsd_jax.verify.pool import PoolError

    command = importlib.import_module(f"opsd_jax.cli.{arguments.command}")
    try:
        if arguments.command in ("train", "evaluate", "convert"):
            _check_platform()
        return command.main(arguments, overrides)
    except Interrupted as stop:
        say(f"{stop}: progress is saved; run the same command again to resume.")
        return stop.exit_code
    except (ConfigError, DataError, PlanError) as error:
        say(str(error))
        return 2
    except Exception as error:
        if hosts.is_loss(error):
            say(
                f"another host is lost ({files.reason(error)}). Run the same command on all hosts "
                "to resume from the last checkpoint."
            )
            return LOST
        if isinstance(error, RecordError | Diverged | NoSignal | PoolError):
            say(str(error))
            return 1
        message = _memory_message(error) or _storage_message(error, arguments)
        if message is None:
            raise
        say(message)
        return 1


def _check_platform() -> None:
    """Raises ConfigError if JAX has no device of the platform that JAX_PLATFORMS names."""
    import jax

    from opsd_jax.options import ConfigError

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter if a plugin is not installed
        reason = str(error).partition("\n")[0].partition(" (set JAX_PLATFORMS")[0]
        raise ConfigError(
            f"JAX_PLATFORMS is {os.environ.get('JAX_PLATFORMS', '')!r}, and JAX finds no such "
            f"device ({reason or 'the plugin is not installed'}); expected cpu, tpu (pip install "
            "'jax[tpu]') or cuda (pip install 'jax[cuda12]') on a machine that has it."
        ) from error


def _memory_message(error: Exception) -> str | None:
    """Returns a message for an error of memory, or None for any other error."""
    import jax

    from opsd_jax.storage import files

    device = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    if not device and not isinstance(error, MemoryError):
        return None
    return (
        f"{'a device' if device else 'this machine'} is out of memory ({files.reason(error)}). "
        "Lower config.STAGE.microbatch, config.STAGE.slots or the last of config.STAGE.buckets, or "
        "shard the model over more devices with config.mesh. For TPUs, `opsd-jax plan` shows what "
        "each program needs."
    )


def say(text: str) -> None:
    """Prints a message to standard error, after the prefix "opsd-jax: "."""
    from opsd_jax.storage.foreign import message

    print(f"opsd-jax: {message(text)}", file=sys.stderr)


def _storage_message(error: Exception, arguments: argparse.Namespace) -> str | None:
    """Returns a message for a storage error, such as a full disk, or None for any other error."""
    from opsd_jax.storage import files

    given = [path for name in ("workdir", "out") if (path := getattr(arguments, name, None))]
    in_bucket = any(map(files.in_bucket, given)) and (
        isinstance(error, OSError) or files.is_bucket_error(error)
    )
    if not in_bucket and not (isinstance(error, OSError) and error.strerror):
        return None
    # The error of a failed write does not name the file.
    where = getattr(error, "filename", None) or (given[0] if given else "a file")
    why = getattr(error, "strerror", None) or files.reason(error)
    return (
        f"{where} cannot be used: {why}. Finished work is kept. Fix this and run the same command "
        "again to resume."
    )
