"""How a stage turns rollouts into batches: the gate, the advantages, the parts."""

import jax
import numpy as np
import pytest

from opsd_jax import config as config_lib
from opsd_jax import losses
from opsd_jax.rollout.collect import Rollouts
from opsd_jax.stages.opsd import opsd
from opsd_jax.stages.rlvr import rlvr
from opsd_jax.verify.groups import Groups, groups
from opsd_jax.verify.verdict import Verdict


@pytest.fixture(scope="module")
def rollouts(task):
    """32 rollouts of 16 problems, every response another, all three groups among them."""
    rng = np.random.default_rng(0)
    responses = [
        np.array([3, i, *rng.integers(1, 32, rng.integers(0, 80))], np.int32) for i in range(32)
    ]
    verdicts = [Verdict(bool(rng.integers(2)), "") for _ in responses]
    return Rollouts(
        problems=[task.train[i // 2] for i in range(32)],
        responses=responses,
        logprobs=[-rng.random(len(r)).astype(np.float32) for r in responses],
        verdicts=verdicts,
        groups=groups(verdicts, rng.random(32) < 0.2),
        wait_seconds=0.0,
    )


def rows_of(batch):
    """The rows of a batch that hold anything, by the second token of their response."""
    found = {}
    for bucket in batch:
        data = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), bucket["rows"])
        for i in np.flatnonzero(data["mask"].any(axis=1)):
            row = jax.tree.map(lambda x, i=i: x[i], data)
            assert row["response"][1] not in found
            found[int(row["response"][1])] = row
    return found


def prompt_of(row, name):
    """The ids of a row's prompt, without padding."""
    before = row[name]["tokens"].shape[0] - row["mask"].shape[0]
    there = row[name]["positions"][:before] >= 0
    return row[name]["tokens"][:before][there].tolist()


@pytest.mark.parametrize(
    ("gate", "weights"),
    [
        ("correct", (1, 0, 0)),
        ("incorrect", (0, 1, 1)),
        ("all", (1, 1, 1)),
        ("1,0.5,0", (1, 0.5, 0)),
    ],
)
def test_opsd_trains_on_what_the_gate_keeps(config, task, model, rollouts, gate, weights):
    section = config.opsd.copy_and_resolve_references()
    section.update({"gate": gate, "prompts": 32, "max_rows": 0})
    stage = opsd(section, task, model.policy, lambda step, params: rollouts)
    (batch,), metrics = stage.batches(0, None)
    rows = rows_of(batch)
    groups_of = np.stack(rollouts.groups, axis=1)
    expected = groups_of @ np.array(weights)
    assert set(rows) == set(np.flatnonzero(expected).tolist())
    assert metrics["active_rows"] == len(rows)
    for i, row in rows.items():
        assert [row[group] for group in Groups._fields] == groups_of[i].tolist()
        np.testing.assert_array_equal(row["response"][row["mask"]], rollouts.responses[i])
        assert prompt_of(row, "student") == task.prompt(rollouts.problems[i])
        assert prompt_of(row, "teacher") == task.teacher_prompt(rollouts.problems[i])
    live = sum(int(bucket["count"]) for bucket in batch)
    assert live <= -(-len(rows) // section.microbatch) + 1  # what is dropped is not computed


def test_opsd_takes_the_first_rows_up_to_its_cap(config, task, model, rollouts):
    section = config.opsd.copy_and_resolve_references()
    section.update({"gate": "correct", "prompts": 32, "max_rows": 5})
    stage = opsd(section, task, model.policy, lambda step, params: rollouts)
    (batch,), _ = stage.batches(0, None)
    assert sorted(rows_of(batch)) == np.flatnonzero(rollouts.groups.correct)[:5].tolist()


def test_rlvr_gives_each_rollout_its_advantage(config, task, model, rollouts):
    stage = rlvr(config.rlvr, task, model.policy, lambda step, params: rollouts)
    parts, metrics = stage.batches(0, None)
    assert len(parts) == config.rlvr.updates == 2
    rewards = rollouts.groups.correct.astype(float)
    assert metrics["reward"] == rewards.mean()
    for part, batch in enumerate(parts):
        rows = rows_of(batch)
        assert sorted(rows) == list(range(16 * part, 16 * part + 16))
        for i, row in rows.items():
            pair = rewards[i - i % 2 : i - i % 2 + 2]
            expected = (rewards[i] - pair.mean()) / (pair.std(ddof=1) + 1e-6)
            np.testing.assert_allclose(row["advantages"], expected, rtol=1e-5)
            logprobs = row["behaviour_logprobs"][row["mask"]]
            np.testing.assert_array_equal(logprobs, rollouts.logprobs[i])


def section_with(section, **changes):
    section = section.copy_and_resolve_references()
    section.update(changes)
    return section


def test_rlvr_leaves_out_groups_without_signal(config, task, model, rollouts):
    """They are not computed, and not counted in the mean."""
    section = section_with(config.rlvr, objective=config_lib.objective("dapo"))
    parts, _ = rlvr(section, task, model.policy, lambda step, params: rollouts).batches(0, None)
    rewards = rollouts.groups.correct.reshape(-1, 2)
    expected = np.flatnonzero(np.repeat(rewards[:, 0] != rewards[:, 1], 2))
    assert 0 < len(expected) < 32
    assert sorted(i for part in parts for i in rows_of(part)) == expected.tolist()


def test_rlvr_punishes_overlong_responses_in_tokens(config, task, model, rollouts):
    section = section_with(config.rlvr, overlong_buffer=60, overlong_factor=0.5)
    parts, metrics = rlvr(section, task, model.policy, lambda *_: rollouts).batches(0, None)
    assert metrics["reward"] == rollouts.groups.correct.mean()
    over = np.clip([(len(r) - 28) / 60 for r in rollouts.responses], 0, 1)
    rewards = rollouts.groups.correct - 0.5 * over
    for i, row in {i: row for part in parts for i, row in rows_of(part).items()}.items():
        pair = rewards[i - i % 2 : i - i % 2 + 2]
        expected = (rewards[i] - pair.mean()) / (pair.std(ddof=1) + 1e-6)
        np.testing.assert_allclose(row["advantages"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("preset", ["grpo", "gspo"])
def test_other_objectives_of_rlvr(config, task, model, params, rollouts, preset):
    """With a KL to the reference, and with a ratio of the sequence."""
    section = section_with(config.rlvr, objective=config_lib.objective(preset))
    stage = rlvr(section, task, model.policy, lambda *_: rollouts)
    assert stage.has_teacher == (preset == "grpo")
    teacher = jax.tree.map(lambda x: 1.1 * x, params) if stage.has_teacher else None
    (batch, _), _ = stage.batches(0, None)
    micro = jax.tree.map(lambda x: x[0], batch[1]["rows"])
    (total, (weight, metrics)), gradient = jax.jit(jax.value_and_grad(stage.loss, has_aux=True))(
        params, teacher, micro
    )
    assert float(weight) == micro["mask"].any(axis=1).sum()  # rows count, not tokens
    assert np.isfinite(total)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    if preset == "grpo":
        assert float(metrics["reference_kl"][0]) > 0


def test_other_losses_of_opsd(config, task, model, params, rollouts):
    """What the config says is what `losses.opsd` gets."""
    changes = {
        "divergence": "jsd,forward_kl,reverse_kl",
        "top_k": 5,
        "clip": 0.1,
        "importance_cap": 2.0,
        "position": "sigmoid",
        "skip_first": 1,
        "aggregation": "token",
    }
    section = section_with(
        config.opsd, gate="1,0.5,0.25", prompts=32, loss=config_lib.distillation(**changes)
    )
    stage = opsd(section, task, model.policy, lambda *_: rollouts)
    (batch,), _ = stage.batches(0, None)
    micro = jax.tree.map(lambda x: x[0], batch[1]["rows"])
    teacher = jax.tree.map(lambda x: 1.1 * x, params)
    total, (weight, _) = jax.jit(stage.loss)(params, teacher, micro)
    logits = {
        name: model.policy.unembed(
            p, model.policy.forward(p, micro[name]["tokens"], micro[name]["positions"])[0]
        )[:, -micro["mask"].shape[1] - 1 : -1]
        for name, p in (("student", params), ("teacher", teacher))
    }
    expected = losses.opsd(
        **logits,
        mask=micro["mask"],
        groups=tuple(micro[group] > 0 for group in Groups._fields),
        tokens=micro["response"],
        behaviour_logprobs=micro["behaviour_logprobs"],
        options=losses.OPSD(gate=(1.0, 0.5, 0.25), **changes),
    )
    np.testing.assert_allclose(total, expected.sum, rtol=1e-4)
    assert float(weight) == float(expected.weight)
