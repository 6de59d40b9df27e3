"""Trains a stage: makes batches, runs the compiled train step, writes metrics and checkpoints.

Everything that the loop does is a function of (state, step). A run that resumes from a checkpoint
therefore ends like one that was never interrupted.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax

from opsd_jax.models.lora import Weights
from opsd_jax.parallel import hosts
from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.parallel import watchdog as watchdog_lib
from opsd_jax.parallel.watchdog import Moment, Wait, Watchdog, waiting
from opsd_jax.policy import Params
from opsd_jax.storage.files import Path
from opsd_jax.storage.names import CHECKPOINTS
from opsd_jax.training import metrics as metrics_lib
from opsd_jax.training import profile
from opsd_jax.training import speed as speed_lib
from opsd_jax.training.base_model import Base
from opsd_jax.training.checkpoint import DEFAULT_OPTIONS, CheckpointOptions, Checkpoints
from opsd_jax.training.signals import Interrupted, StopSignal
from opsd_jax.training.stage import Batch, Metric, Stage, StepData
from opsd_jax.training.state import State, abstract_state, init_state
from opsd_jax.training.step import batch_shardings, compile_train_step

DIAGNOSED = 3  # first steps whose rollouts are described if few of them have an answer

CARRIED = "carried"  # name of what a step carries over, in a checkpoint

logger = logging.getLogger(__name__)


class Diverged(RuntimeError):
    """The gradient was not finite for too many steps in a row."""


class NoSignal(RuntimeError):
    """No step had a gradient for too many steps in a row."""


class LoopOptions(NamedTuple):
    """The options of a stage's training loop, `run_stage`.

    Attributes:
      checkpoint_every: number of steps between two checkpoints; the last step always saves one.
      max_nonfinite: number of steps in a row without a finite gradient that ends the run.
      max_without_signal: number of steps in a row without a gradient that ends the run; 0 for none.
      checkpoints: which checkpoints to keep.
      identity: JSON-ready values that identify the run; checkpoints with others are refused.
      ancestors: identities of the runs that this run was forked from; theirs are accepted.
      wandb_project: Weights & Biases project; "" for none.
      profile: number of the step to trace; None for none.
    """

    checkpoint_every: int
    max_nonfinite: int
    max_without_signal: int = 0
    checkpoints: CheckpointOptions = DEFAULT_OPTIONS
    identity: Mapping[str, Any] | None = None
    ancestors: Sequence[Mapping[str, Any]] = ()
    wandb_project: str = ""
    profile: int | None = None


Report = Callable[[int, dict[str, float]], None]  # called with a step and its metrics


def run_stage(
    stage: Stage,
    optimizer: optax.GradientTransformation,
    params: Callable[[], Params],
    *,
    abstract_params: Params,
    mesh: jax.sharding.Mesh,
    directory: Path,
    options: LoopOptions,
    stop: StopSignal,
    report: Report = lambda step, values: None,
    base: Base | None = None,
) -> Params:
    """Trains a stage to its last step. Resumes from the newest checkpoint if there is one.

    Args:
      stage: the stage.
      optimizer: the stage's optimizer.
      params: returns the stage's initial parameters, on the shardings of `abstract_params`. They
        are donated to the state. Not called if there is a checkpoint.
      abstract_params: shapes, dtypes and shardings of the parameters.
      mesh: the mesh of the parameters.
      directory: where `checkpoints/`, metrics, `groups.jsonl` and TensorBoard events are written.
      options: checkpoints and limits.
      stop: asks the run to stop; checked after every step. A stage that samples checks it too.
      report: called with the number and the metrics of each step, one step late.
      base: the base model, for a stage that trains an adapter: the parameters above are then the
        adapter's. Checkpoints with an adapter of another model are refused.

    Returns:
      The final parameters.

    Raises:
      Interrupted: `stop` received a signal; the completed steps, if any, are in a checkpoint.
      Diverged: `options.max_nonfinite` steps in a row had no finite gradient.
      NoSignal: `options.max_without_signal` steps in a row had no gradient.
    """
    abstract = abstract_state(abstract_params, optimizer, stage.teacher, mesh)
    saved = options.identity, options.checkpoints, options.ancestors, base and base.model
    with contextlib.ExitStack() as stack:
        began = watchdog_lib.now()
        checkpoints = stack.enter_context(Checkpoints(directory / CHECKPOINTS, *saved))
        start, state, carried = _restored(checkpoints, abstract, stage.carried)
        state = state or _initial_state(stage, optimizer, params(), abstract)
        writer = stack.enter_context(metrics_lib.writer(directory, start, options.wandb_project))
        if start >= stage.steps:
            return state["params"]
        train_step = _compiled(stage, optimizer, abstract, mesh, base and base.params)
        recorder = _Recorder(checkpoints, writer, report, options, stage, directory, mesh, began)
        # An implicit transfer makes host and device wait for each other without any sign of it.
        with Watchdog(directory.name) as watchdog, jax.transfer_guard("disallow"):
            steps, stage = range(start, stage.steps), _with_weights(stage, base)
            state = _run_steps(steps, stage, train_step, state, carried, recorder, watchdog, stop)
            return state["params"]


def _with_weights(stage: Stage, base: Base | None) -> Stage:
    """Returns a stage whose `batches` gets the base model too, if the state has an adapter."""
    if base is None:
        return stage
    batches = lambda step, adapter, *carried: stage.batches(
        step, Weights(base.params, adapter), *carried
    )
    return stage._replace(batches=batches)


def _compiled(
    stage: Stage,
    optimizer: optax.GradientTransformation,
    abstract: State,
    mesh: jax.sharding.Mesh,
    base: Params | None,
) -> Callable[[State, Batch], tuple[State, dict[str, Metric]]]:
    """Compiles the train step of a stage, for batches in host memory."""
    fixed = () if base is None else (base,)
    abstract_base = base and mesh_lib.abstract_of(base, jax.tree.map(lambda x: x.sharding, base))
    compiled = compile_train_step(stage, optimizer, abstract, mesh, abstract_base)
    shardings = batch_shardings(stage.empty_batch, mesh)
    return lambda state, batch: compiled(state, mesh_lib.placed(batch, shardings), *fixed)


def _run_steps(
    steps: range,
    stage: Stage,
    train_step: Callable[[State, Batch], tuple[State, dict[str, Metric]]],
    state: State,
    carried: Any,
    recorder: _Recorder,
    watchdog: Watchdog,
    stop: StopSignal,
) -> State:
    """Runs the given training steps of a stage, and returns the final state."""
    recorder.check_profile(steps)
    for step in steps:
        watchdog.begin(step)
        began = watchdog_lib.now()
        with recorder.traced(step):
            try:
                given = () if carried is None else (carried,)
                data = stage.batches(step, state["params"], *given)
            except Interrupted:  # the resumed run makes this step's batches again
                recorder.save(step, state, carried, ended=began)
                raise
            dispatched, totals = time.monotonic(), []
            with waiting(Wait.TRAIN_STEP):  # on CPUs, the call may compute the update
                for batch in data.batches:
                    state, metrics = train_step(state, batch)
                    totals.append(metrics)
        recorder.write_pending(ended=began)
        recorder.add(step, totals, data, dispatched)
        signum = stop.received()
        completed, carried = step + 1, data.carried
        if signum or recorder.is_due(completed):
            recorder.save(completed, state, carried, ended=watchdog_lib.now())
        if signum:
            raise Interrupted(signum)
    return state


def _restored(
    checkpoints: Checkpoints, abstract: State, carried: Any
) -> tuple[int, State | None, Any]:
    """Restores the newest intact checkpoint.

    Args:
      checkpoints: the checkpoints of the stage.
      abstract: shapes, dtypes and shardings of the training state.
      carried: `Stage.carried`.

    Returns:
      The number of completed steps, the training state, and what the last step carried over;
      0, None and `carried` if there is no checkpoint.
    """
    if carried is None:
        return *checkpoints.restore(abstract), None
    replicated = jax.tree.map(lambda _: abstract["step"].sharding, carried)
    saved = abstract | {CARRIED: mesh_lib.abstract_of(carried, replicated)}
    start, state = checkpoints.restore(saved)
    return start, state, carried if state is None else jax.device_get(state.pop(CARRIED))


def _initial_state(
    stage: Stage, optimizer: optax.GradientTransformation, params: Params, abstract: State
) -> State:
    """Returns the initial training state with the shardings of `abstract`. Donates `params`."""
    init = functools.partial(init_state, optimizer=optimizer, teacher=stage.teacher)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(init, out_shardings=shardings, donate_argnums=0)(params)


class _Dispatched(NamedTuple):
    """A step whose metrics have not been written.

    Attributes:
      step: its number.
      totals: the metrics of each update, on the devices.
      data: its data.
      dispatched: the `time.monotonic()` before its updates were dispatched.
      updated: the `time.monotonic()` at which the devices had computed them.
    """

    step: int
    totals: list[Any]
    data: StepData
    dispatched: float
    updated: concurrent.futures.Future[float]


def _time_of(arrays: Any) -> float:
    """Waits until the devices have computed arrays. Returns the `time.monotonic()`."""
    jax.block_until_ready(arrays)
    return time.monotonic()


class _Recorder:
    """Writes the metrics of each step, one step late, and saves checkpoints.

    Metrics of a step are fetched after the next step has been dispatched, so the device never waits
    for the host to fetch them.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        writer: metrics_lib.MetricsWriter | metrics_lib.NoWriter,
        report: Report,
        options: LoopOptions,
        stage: Stage,
        directory: Path,
        mesh: jax.sharding.Mesh,
        began: Moment,
    ):
        """Creates a recorder of `stage`, whose directory has the name of its config section.

        The time of the first step is measured from `began`.
        """
        self._checkpoints, self._writer, self._report = checkpoints, writer, report
        self._options, self._stage, self._directory = options, stage, directory
        self._nonfinite, self._without_signal = 0, 0  # steps in a row
        self._pending: _Dispatched | None = None
        self._latest: dict[str, float] = {}  # metrics of the last step that was written
        self._ended = began  # the moment at which that step ended
        self._speed = speed_lib.Speed(mesh)
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "updates")
        self._updated = began.seconds  # time at which the devices had computed its updates

    def check_profile(self, steps: range) -> None:
        """Logs a warning if the options ask for a trace of a step that is not among `steps`."""
        wanted = self._options.profile
        if wanted is not None and wanted not in steps:
            logger.warning(
                "--profile %d: %s writes no trace; it runs the steps %d to %d",
                wanted,
                self._directory.name,
                steps[0],
                steps[-1],
            )

    def traced(self, step: int) -> contextlib.AbstractContextManager[None]:
        """Returns a context manager that writes a trace of `step` if the options ask for it."""
        return profile.trace(self._directory, step, self._options.profile)

    def add(self, step: int, totals: list[Any], data: StepData, dispatched: float) -> None:
        """Stores the metrics of a step until `write_pending` writes them.

        `dispatched` is the `time.monotonic()` before its updates were dispatched.
        """
        updated = self._thread.submit(_time_of, totals)
        self._pending = _Dispatched(step, totals, data, dispatched, updated)

    def write_pending(self, ended: Moment) -> None:
        """Fetches and writes the metrics that `add` stored. Does nothing if there are none.

        Args:
          ended: the moment at which the step ended and the next one began.

        Raises:
          Diverged: too many steps in a row had no finite gradient.
          NoSignal: too many steps in a row had no gradient.
        """
        if self._pending is None:
            return
        (step, totals, data, dispatched, updated), self._pending = self._pending, None
        with waiting(Wait.TRAIN_STEP):
            means = metrics_lib.means(jax.device_get(totals))
            before, self._updated = self._updated, updated.result()
        values = self._stage.summary(means) | data.metrics
        values |= speed_lib.seconds(self._ended, ended)
        flops = self._stage.flops and sum(map(self._stage.flops, data.batches))
        update_seconds = self._updated - max(before, dispatched)
        values |= self._speed(values, flops, update_seconds, data.decoding)
        self._ended = ended
        self._latest = values
        self._writer.write(step, values, data.groups)
        self._report(step, values)
        self._nonfinite = self._nonfinite + 1 if values["nonfinite"] == 1 else 0
        if self._nonfinite >= self._options.max_nonfinite:
            raise Diverged(
                f"the gradient was not finite for {self._nonfinite} steps in a row, up to step "
                f"{step}; expected fewer than config.max_nonfinite = "
                f"{self._options.max_nonfinite}. The newest checkpoint is from step "
                f"{self._checkpoints.latest}. Try a lower learning_rate or clip_norm, in another "
                "workdir."
            )
        self._check_signal(step, values, data)

    def _check_signal(self, step: int, values: dict[str, float], data: StepData) -> None:
        """Describes the rollouts of the first steps. Raises NoSignal if no step has a gradient."""
        if step < DIAGNOSED and data.diagnose is not None and hosts.is_first():
            diagnosis = data.diagnose(self._directory.name)
            if diagnosis.details or step == 0:
                logger.info("%s, step %d: %s", self._directory.name, step, diagnosis)
        # An update without rows has no metric `grad_norm`.
        learns = values.get("grad_norm", 0.0) != 0
        self._without_signal = 0 if learns else self._without_signal + 1
        if self._without_signal != self._options.max_without_signal or learns:
            return
        seen = f" In this step, {data.diagnose(self._directory.name)}" if data.diagnose else ""
        raise NoSignal(
            f"{self._directory.name} learns nothing: no update had a gradient for "
            f"{self._without_signal} steps in a row, up to step {step}; expected fewer than "
            f"config.max_without_signal = {self._options.max_without_signal} (0 for no "
            f"limit).{seen}"
        )

    def is_due(self, steps: int) -> bool:
        """Returns whether a checkpoint is due after this number of completed steps."""
        return steps % self._options.checkpoint_every == 0 or steps == self._stage.steps

    def save(self, steps: int, state: State, carried: Any, ended: Moment) -> None:
        """Writes all pending metrics, then saves a checkpoint.

        Args:
          steps: number of completed steps; nothing is saved for 0.
          state: the state after them.
          carried: what the last of them carried over; None if steps carry nothing over.
          ended: as in `write_pending`.
        """
        self.write_pending(ended)
        self._writer.flush()
        if not steps:
            return
        if carried is not None:
            replicated = jax.tree.map(lambda _: state["step"].sharding, carried)
            state = state | {CARRIED: mesh_lib.placed(carried, replicated)}
        self._checkpoints.save(steps, state, self._latest)
