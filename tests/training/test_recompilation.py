"""A run compiles its programs at the start and never again."""

import jax
import pytest

from opsd_jax.config.run_options import parse_run
from opsd_jax.parallel import aot
from opsd_jax.run import assembly
from opsd_jax.training.loop import LoopOptions, run_stage
from opsd_jax.training.optimizer import make_optimizer
from opsd_jax.training.signals import StopSignal
from opsd_jax.training.state import abstract_state
from opsd_jax.training.step import compile_train_step


def test_nothing_compiles_after_the_first_steps(config, tmp_path):
    """The number of active rows and their lengths differ between steps: OPSD trains here on the
    incorrect rollouts that are not truncated, whose number varies.
    """
    compiled = []

    def count(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(seconds)

    section = config.copy_and_resolve_references()
    section.opsd.update({"gate": "0,1,0", "steps": 10, "checkpoint_every": 100, "init_from": ""})
    section.stages = ("opsd",)
    this, seen = assembly.assemble(parse_run(section), tmp_path), []
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        with this.pool, StopSignal() as stop:
            stage = assembly.make_stage(this, "opsd")
            run_stage(
                stage,
                make_optimizer(this.config.sections["opsd"].optimizer, 10),
                lambda: this.parameters.of(""),
                abstract_params=this.parameters.abstract,
                mesh=this.parameters.mesh,
                directory=tmp_path / "opsd",
                options=LoopOptions(checkpoint_every=100, max_nonfinite=10),
                stop=stop,
                report=lambda step, values: seen.append((len(compiled), values)),
            )
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert compiled
    # A step is reported after the next one was dispatched: nothing compiles from the third on.
    assert len({number for number, _ in seen[1:-1]}) == 1
    assert len({values["active_rows"] for _, values in seen}) > 2
    assert len({values["useful_tokens"] for _, values in seen}) > 2


@pytest.mark.parametrize("name", ["sft", "rlvr", "opsd"])
def test_a_train_step_is_the_same_program_whatever_was_traced_before(
    config, tmp_path, monkeypatch, name
):
    """JAX's persistent compilation cache finds the program of a resumed run only if it is."""
    monkeypatch.setattr(aot, "compiled", lambda _, lowered: lowered.as_text())
    this = assembly.assemble(parse_run(config), tmp_path)
    with this.pool:
        stage = assembly.make_stage(this, name)
        optimizer = make_optimizer(this.config.sections[name].optimizer, 10)
        mesh = this.parameters.mesh
        abstract = abstract_state(this.parameters.abstract, optimizer, stage.teacher, mesh)
        first, second = (compile_train_step(stage, optimizer, abstract, mesh) for _ in range(2))
    assert first == second
