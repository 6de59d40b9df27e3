"""How a stage turns rollouts into batches: the gate, the advantages, the parts."""

import jax
import numpy as np
import pytest

from opsd_jax.rollout.collect import Rollouts
from opsd_jax.stages.opsd import opsd
from opsd_jax.stages.rlvr import rlvr
from opsd_jax.verify.verdict import Verdict, groups


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
    expected = np.stack(rollouts.groups, axis=1) @ np.array(weights)
    assert set(rows) == set(np.flatnonzero(expected).tolist())
    assert metrics["active_rows"] == len(rows)
    for i, row in rows.items():
        assert row["weight"] == expected[i]
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
