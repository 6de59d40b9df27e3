"""The loop of a stage: batches from the host, the compiled step, metrics, checkpoints.

Restarted with the same arguments it goes on from the newest checkpoint, and everything it does is a
function of (state, step): the run is then that of one which was never stopped.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.parallel.watchdog import Watchdog, waiting
from opsd_jax.policy import Params
from opsd_jax.storage.files import Path
from opsd_jax.training import metrics as metrics_lib
from opsd_jax.training.checkpoint import LAST_TWO, CheckpointOptions, Checkpoints
from opsd_jax.training.signals import Interrupted, StopSignal
from opsd_jax.training.stage import Stage, StepData
from opsd_jax.training.state import abstract_state, init_state
from opsd_jax.training.step import batch_shardings, compile_train_step


class Diverged(RuntimeError):
    """Too many updates in a row had a gradient that is not finite."""


def run_stage(
    stage: Stage,
    optimizer: optax.GradientTransformation,
    params: Callable[[], Params],
    *,
    abstract_params: Params,
    mesh: jax.sharding.Mesh,
    directory: Path,
    checkpoint_every: int,
    keep: CheckpointOptions = LAST_TWO,
    about: Mapping[str, Any] | None = None,
    max_nonfinite: int,
    stop: StopSignal,
    report: Callable[[int, dict[str, float]], None] = lambda step, values: None,
    wandb_project: str = "",
) -> Params:
    """Runs a stage from where it is to its end.

    Args:
      stage: what to run.
      optimizer: its optimiser.
      params: makes the stage's initial parameters, on their shardings; the state takes their
        place. Not called where the stage goes on from a checkpoint.
      abstract_params: their shapes, with shardings.
      mesh: the mesh they lie on.
      directory: gets `checkpoints/`, `metrics.jsonl`, `groups.jsonl` and TensorBoard events.
      checkpoint_every: steps between checkpoints; there is one at the end in any case.
      keep: which of them stay.
      about: what they belong to, JSON-ready (`Checkpoints`).
      max_nonfinite: this many steps in a row whose updates were all skipped for a gradient that is
        not finite end the run.
      stop: is looked at after every step; a stage that samples looks at it as well, in the middle.
      report: is told each step's number and metrics, one step late.
      wandb_project: "" for none.

    Returns:
      The final parameters.

    Raises:
      Interrupted: `stop` received a signal; a checkpoint was saved, unless no step was done.
      Diverged: see `max_nonfinite`; the checkpoint from before it stays.
    """
    init = lambda p: init_state(p, optimizer, stage.teacher)
    abstract = abstract_state(abstract_params, optimizer, stage.teacher, mesh)
    where = batch_shardings(stage.empty_batch, mesh)

    with contextlib.ExitStack() as stack:
        clock = time.monotonic()
        checkpoints = stack.enter_context(Checkpoints(directory / "checkpoints", about, keep))
        start, restored = checkpoints.restore(abstract)
        if restored is not None:
            state = restored
        else:
            shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
            state = jax.jit(init, out_shardings=shardings, donate_argnums=0)(params())
        writer = stack.enter_context(metrics_lib.writer(directory, start, wandb_project))
        if start < stage.steps:
            train_step = compile_train_step(stage, optimizer, abstract, mesh)

        nonfinite = 0
        pending: tuple[int, list[Any], StepData] | None = None
        latest: dict[str, float] = {}  # metrics of the last step that was flushed

        def flush(ended: float) -> None:
            """Fetches the metrics of the step before, which the device has done by now; `ended` is
            when it was over: what came since is of the next.
            """
            nonlocal pending, clock, nonfinite, latest
            if pending is None:
                return
            step, totals, data = pending
            pending = None
            with waiting("the train step"):
                values = metrics_lib.means(jax.device_get(totals)) | data.metrics
            values["seconds"], clock = ended - clock, ended
            latest = values
            writer.write(step, values, data.groups)
            report(step, values)
            nonfinite = nonfinite + 1 if values["nonfinite"] == 1 else 0
            if nonfinite >= max_nonfinite:
                raise Diverged(
                    f"the gradient was not finite for {nonfinite} steps in a row, up to step "
                    f"{step}; the newest checkpoint is of step {checkpoints.latest}. A run in "
                    "another workdir with a lower learning rate or clip_norm may do better."
                )

        watchdog = stack.enter_context(Watchdog(directory.name))
        for step in range(start, stage.steps):
            watchdog.begin(step)
            began = time.monotonic()
            try:
                data = stage.batches(step, state["params"])
            except Interrupted:  # while sampling: this step will be made again
                flush(began)
                writer.flush()
                if step and checkpoints.latest != step:
                    checkpoints.save(step, state, latest)
                raise
            totals = []
            for batch in data.batches:
                state, metrics = train_step(state, mesh_lib.placed(batch, where))
                totals.append(metrics)
            flush(began)
            pending = step, totals, data
            done, stopping = step + 1, stop.received()
            if done % checkpoint_every == 0 or done == stage.steps or stopping:
                flush(time.monotonic())
                writer.flush()
                checkpoints.save(done, state, latest)
            if stopping:
                raise Interrupted(stopping)
        return state["params"]
