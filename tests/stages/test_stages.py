"""How a stage turns rollouts into batches: its gate, advantages and optimizer updates."""

import dataclasses
import functools
import sys
import threading
from concurrent.futures import Future

import jax
import numpy as np
import pytest
from tiny_config import stage_options

from opsd_jax import config as config_lib
from opsd_jax import losses
from opsd_jax.config.run_options import parse_run
from opsd_jax.data.arithmetic import informed_prompt
from opsd_jax.options import names_from
from opsd_jax.rollout import sampling
from opsd_jax.rollout.collect import Rollouts
from opsd_jax.stages import opsd as opsd_lib
from opsd_jax.stages import rlvr as rlvr_lib
from opsd_jax.stages.opsd import stage as opsd
from opsd_jax.stages.privileged import ContextFinder
from opsd_jax.stages.rlvr import stage as rlvr
from opsd_jax.stages.rollouts import step_rollouts
from opsd_jax.verify.outcomes import Outcomes
from opsd_jax.verify.verdict import Verdict


@pytest.fixture(scope="module")
def rollouts(task):
    """32 rollouts of 16 problems, with different responses and all three outcomes."""
    rng = np.random.default_rng(0)
    responses = [
        np.array([3, i, *rng.integers(1, 32, rng.integers(0, 80))], np.int32) for i in range(32)
    ]
    verdicts = [Verdict(bool(rng.integers(2)), "") for _ in responses]
    return Rollouts(
        problems=[task.train[i // 2] for i in range(32)],
        responses=responses,
        sampling_logprobs=[-rng.random(len(r)).astype(np.float32) for r in responses],
        model_logprobs=[-1 - rng.random(len(r)).astype(np.float32) for r in responses],
        truncated=rng.random(32) < 0.2,
        replies=verdicts,
    )


def rows_of(batch):
    """Returns the rows of a batch that are not padding, by the second token of their response."""
    found = {}
    for bucket in batch:
        data = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), bucket["rows"])
        for i in np.flatnonzero(data["mask"].any(axis=1)):
            row = jax.tree.map(lambda x, i=i: x[i], data)
            second = int(row["targets"][row["mask"]][1])
            assert second not in found
            found[second] = row
    return found


def prompt_of(row, name):
    """Returns the ids of a row's prompt, without padding."""
    first = np.argmax(row["mask"])
    last = first if name == "student" else row[name]["columns"][first]
    return row[name]["tokens"][: last + 1].tolist()


@pytest.mark.parametrize(
    ("gate", "weights"),
    [
        ("correct", (1, 0, 0)),
        ("incorrect", (0, 1, 1)),
        ("all", (1, 1, 1)),
        ("1,0.5,0", (1, 0.5, 0)),
    ],
)
def test_opsd_trains_on_the_rollouts_that_the_gate_keeps(
    config, task, model, rollouts, gate, weights
):
    section = stage_options(config.opsd, gate=gate, prompts=32, max_rows=0)
    stage = opsd(
        section, task, model.policy, lambda step, params: rollouts, ContextFinder(section, task, 1)
    )
    (batch,), metrics, *_ = stage.batches(0, None)
    rows = rows_of(batch)
    outcomes_Nx3 = np.stack(rollouts.judged.outcomes, axis=1)
    expected = outcomes_Nx3 @ np.array(weights)
    assert set(rows) == set(np.flatnonzero(expected).tolist())
    assert metrics["active_rows"] == len(rows)
    for i, row in rows.items():
        assert [row[outcome] for outcome in Outcomes._fields] == outcomes_Nx3[i].tolist()
        np.testing.assert_array_equal(row["targets"][row["mask"]], rollouts.responses[i])
        logprobs = row["behaviour_logprobs"][row["mask"]]
        np.testing.assert_array_equal(logprobs, rollouts.sampling_logprobs[i])
        assert prompt_of(row, "student") == task.prompt(rollouts.problems[i])
        problem = rollouts.problems[i]
        assert prompt_of(row, "teacher") == informed_prompt(problem, problem.solution)
    computed = sum(int(bucket["count"]) for bucket in batch)
    assert computed <= -(-len(rows) // section.microbatch) + 1  # dropped rows are not computed


def test_opsd_takes_the_first_rows_up_to_its_cap(config, task, model, rollouts):
    section = stage_options(config.opsd, gate="correct", prompts=32, max_rows=5)
    stage = opsd(
        section, task, model.policy, lambda step, params: rollouts, ContextFinder(section, task, 1)
    )
    (batch,), *_ = stage.batches(0, None)
    assert sorted(rows_of(batch)) == np.flatnonzero(rollouts.judged.outcomes.correct)[:5].tolist()


def test_rlvr_gives_each_rollout_its_advantage(config, task, model, rollouts):
    stage = rlvr(stage_options(config.rlvr), task, model.policy, lambda step, params: rollouts)
    parts, metrics, *_ = stage.batches(0, None)
    assert len(parts) == config.rlvr.updates == 2
    rewards = rollouts.judged.outcomes.correct.astype(float)
    assert metrics["reward"] == rewards.mean()
    for part, batch in enumerate(parts):
        rows = rows_of(batch)
        assert sorted(rows) == list(range(16 * part, 16 * part + 16))
        for i, row in rows.items():
            pair = rewards[i - i % 2 : i - i % 2 + 2]
            expected = (rewards[i] - pair.mean()) / (pair.std(ddof=1) + 1e-6)
            np.testing.assert_allclose(row["advantages"], expected, rtol=1e-5)
            logprobs = row["behaviour_logprobs"][row["mask"]]
            np.testing.assert_array_equal(logprobs, rollouts.sampling_logprobs[i])


def test_rlvr_leaves_out_groups_without_signal(config, task, model, rollouts):
    """Dropped groups are not computed and do not count in the mean."""
    section = stage_options(config.rlvr, objective=config_lib.objective("dapo"))
    parts, *_ = rlvr(section, task, model.policy, lambda step, params: rollouts).batches(0, None)
    rewards = rollouts.judged.outcomes.correct.reshape(-1, 2)
    expected = np.flatnonzero(np.repeat(rewards[:, 0] != rewards[:, 1], 2))
    assert 0 < len(expected) < 32
    assert sorted(i for part in parts for i in rows_of(part)) == expected.tolist()


def test_rlvr_punishes_overlong_responses_in_tokens(config, task, model, rollouts):
    section = stage_options(config.rlvr, overlong_buffer=60, overlong_factor=0.5)
    parts, metrics, *_ = rlvr(section, task, model.policy, lambda *_: rollouts).batches(0, None)
    assert metrics["reward"] == rollouts.judged.outcomes.correct.mean()
    over = np.clip([(len(r) - 28) / 60 for r in rollouts.responses], 0, 1)
    rewards = rollouts.judged.outcomes.correct - 0.5 * over
    for i, row in {i: row for part in parts for i, row in rows_of(part).items()}.items():
        pair = rewards[i - i % 2 : i - i % 2 + 2]
        expected = (rewards[i] - pair.mean()) / (pair.std(ddof=1) + 1e-6)
        np.testing.assert_allclose(row["advantages"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("preset", ["grpo", "gspo"])
def test_other_objectives_of_rlvr(config, task, model, params, rollouts, preset):
    """GRPO has a KL term to the reference model, and GSPO has a ratio per sequence."""
    section = stage_options(config.rlvr, objective=config_lib.objective(preset))
    stage = rlvr(section, task, model.policy, lambda *_: rollouts)
    assert (stage.teacher is not None) == (preset == "grpo")
    teacher = jax.tree.map(lambda x: 1.1 * x, params) if stage.teacher else None
    (batch, _), *_ = stage.batches(0, None)
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
    """The loss of the stage equals `losses.opsd` with the options of the config."""
    changes = {
        "divergence": "jsd,forward_kl,reverse_kl",
        "top_k": 5,
        "clip": 0.1,
        "importance_cap": 2.0,
        "position": "sigmoid",
        "skip_first": 1,
        "aggregation": "token",
    }
    section = stage_options(
        config.opsd, gate="1,0.5,0.25", prompts=32, loss=config_lib.distillation(**changes)
    )
    stage = opsd(section, task, model.policy, lambda *_: rollouts, ContextFinder(section, task, 1))
    (batch,), *_ = stage.batches(0, None)
    micro = jax.tree.map(lambda x: x[0], batch[1]["rows"])
    teacher = jax.tree.map(lambda x: 1.1 * x, params)
    total, (weight, _) = jax.jit(stage.loss)(params, teacher, micro)
    logits = {
        name: model.policy.unembed(
            p, model.policy.forward(p, micro[name]["tokens"], micro[name]["positions"])[0]
        )
        for name, p in (("student", params), ("teacher", teacher))
    }
    columns = micro["teacher"]["columns"][..., None]
    logits["teacher"] = np.take_along_axis(np.asarray(logits["teacher"]), columns, axis=1)
    expected = losses.opsd(
        **logits,
        mask=micro["mask"],
        outcomes=tuple(micro[outcome] > 0 for outcome in Outcomes._fields),
        tokens=micro["targets"],
        behaviour_logprobs=micro["behaviour_logprobs"],
        options=losses.OPSD(gate=(1.0, 0.5, 0.25), **changes),
    )
    np.testing.assert_allclose(total, expected.sum, rtol=1e-4)
    assert float(weight) == float(expected.weight)


@pytest.fixture
def collector(task):
    """A fake collector that records its problems, keys and sampling parameters. A response has the
    id of its problem and its own number, and `right(id, number)` says whether it is correct.
    """

    class Collector:
        def __init__(self, right):
            self.right, self.calls, self.keys = right, [], []

        def __call__(self, params, problems, *, key, sampling_params, poll):
            self.calls.append([problem.id for problem in problems])
            self.keys.append(str(jax.random.key_data(key)))
            self.sampling_params, self.poll = sampling_params, poll
            replies = [
                Future() if (i + p.id) % 2 else Verdict(self.right(p.id, i), "match")
                for p in problems
                for i in range(2)
            ]
            for i, reply in enumerate(replies):
                if isinstance(reply, Future):
                    reply.set_result(Verdict(self.right(problems[i // 2].id, i % 2), "match"))
            return Rollouts(
                problems=[p for p in problems for _ in range(2)],
                responses=[np.array([3, p.id % 30, i], np.int32) for p in problems for i in (0, 1)],
                sampling_logprobs=[np.full(3, -1.0, np.float32)] * (2 * len(problems)),
                model_logprobs=[np.full(3, -1.0, np.float32)] * (2 * len(problems)),
                truncated=np.zeros(2 * len(problems), bool),
                replies=replies,
            )

    return Collector


def poll():
    """A fake check for signals."""


def stage_with(module, section, task, model, collector):
    """Makes the stage as a run does, but with the given collector."""
    roll_out = step_rollouts(
        section,
        task,
        collector,
        seed=5,
        vocab_size=40,
        capacity=section.capacity,
        trains=functools.partial(module.trains, section),
        poll=poll,
    )
    more = [ContextFinder(section, task, section.group_size)] if module is opsd_lib else []
    return module.stage(section, task, model.policy, roll_out, *more)


@pytest.mark.parametrize("every", [2, 5, 1000])
def test_dynamic_sampling_replaces_problems_without_signal(config, task, model, collector, every):
    """One in `every` problems has one correct rollout of two; the others have none or both."""
    section = stage_options(
        config.rlvr, objective=config_lib.objective("dapo"), prompts=8, resample_rounds=3
    )
    right = lambda problem, i: i == 0 if problem % every == 0 else problem % 2 == 0
    sampled = collector(right)
    stage = stage_with(rlvr_lib, section, task, model, sampled)
    parts, metrics, records, *_ = stage.batches(3, None)
    ids = [i for call in sampled.calls for i in call]
    assert len(set(ids)) == len(ids) == metrics["problems"] == len(records)
    informative = [i for i in ids if i % every == 0]
    rows = [row["targets"][row["mask"]][1] for part in parts for row in all_rows(part)]
    assert rows == [i % 30 for i in informative[:8] for _ in range(2)]
    assert len(sampled.calls) <= 4
    assert len(rows) == 16 or len(sampled.calls) == 4
    assert (len(sampled.calls) > 1) == (every > 1)
    all_right = sum(i % every > 0 and i % 2 == 0 for i in ids)
    all_wrong = sum(i % every > 0 and i % 2 == 1 for i in ids)
    assert metrics["groups_all_correct"] == all_right
    assert metrics["groups_all_incorrect"] == all_wrong
    sizes = [len(all_rows(part)) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert [r["correct"] for r in records] == [
        1 if i % every == 0 else 2 * (i % 2 == 0) for i in ids
    ]
    before, keys = list(sampled.calls), list(sampled.keys)
    sampled.calls.clear()
    stage.batches(4, None)
    assert not set(before[0]) & set(sampled.calls[0])
    assert len(set(sampled.keys)) == len(sampled.keys)  # no two rounds have the same random numbers
    sampled.calls.clear()
    sampled.keys.clear()
    stage.batches(3, None)  # a resumed run samples the same problems with the same keys
    assert (sampled.calls, sampled.keys) == (before, keys)


def test_a_stage_samples_from_its_own_distribution(config, task, model, collector):
    """The temperature is the stage's, no token is excluded, and EOS comes from the tokenizer."""
    section = stage_options(config.rlvr, prompts=8, temperature=0.75)
    sampled = collector(lambda problem, i: i == 0)
    stage_with(rlvr_lib, section, task, model, sampled).batches(0, None)
    expected = sampling.params(40, stop=task.tokenizer.eos_ids, temperature=0.75)
    for got, want in zip(sampled.sampling_params, expected, strict=True):
        np.testing.assert_array_equal(got, want)
    assert sampled.poll is poll


@pytest.mark.parametrize("algorithm", [rlvr_lib.ALGORITHM, opsd_lib.ALGORITHM])
def test_the_rollouts_of_a_stage_speculate(config, algorithm):
    """The engine of the rollouts gets the option. The engines of memos do not."""
    name = "rlvr" if algorithm is rlvr_lib.ALGORITHM else "opsd"
    changes = {"contexts": ("memo",)} if name == "opsd" else {}
    options = stage_options(config[name], speculation=4, **changes)
    rollouts, *memos = algorithm.sampling(options)
    assert rollouts.engine(dict)["speculation"] == 4
    speculation = [memo.engine(dict)["speculation"] for memo in memos]
    assert speculation == ([0, 0] if name == "opsd" else [])


def test_resampled_problems_are_not_repeated_in_later_steps(config, task, model, collector):
    """A round has just enough problems to fill the batch if all of them are informative."""
    section = stage_options(
        config.rlvr, objective=config_lib.objective("dapo"), prompts=6, resample_rounds=3
    )
    sampled = collector(lambda problem, i: i == 0 and problem % 3 == 0)
    stage = stage_with(rlvr_lib, section, task, model, sampled)
    made = []
    for step in range(12):
        stage.batches(step, None)
        missing = 6
        for call in sampled.calls:
            assert len(call) == missing
            missing -= sum(i % 3 == 0 for i in call)
        made += sampled.calls
        sampled.calls.clear()
    ids = [i for call in made for i in call]
    assert len(made) > 20
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("preset", ["dapo", "reinforce++"])
def test_dropped_rollouts_change_no_advantage(config, task, model, rollouts, preset):
    """Batch statistics also use only the rollouts that train."""
    objective = config_lib.objective(preset, drop_uninformative=True)
    section = stage_options(config.rlvr, objective=objective)
    parts, *_ = rlvr(section, task, model.policy, lambda *_: rollouts).batches(0, None)
    correct = rollouts.judged.outcomes.correct.reshape(-1, 2)
    kept = np.flatnonzero(np.repeat(correct[:, 0] != correct[:, 1], 2))
    alone = losses.PolicyGradient(**objective).advantages(
        rollouts.judged.outcomes.correct[kept].astype(np.float32), 2
    )
    got = {i: row["advantages"] for part in parts for i, row in rows_of(part).items()}
    assert 0 < len(kept) < 32
    for i, advantage in zip(kept, alone, strict=True):
        np.testing.assert_allclose(got[i], advantage, rtol=1e-6)


def all_rows(batch):
    """Returns the rows of a batch that are not padding, in order."""
    found = []
    for bucket in batch:
        data = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), bucket["rows"])
        for i in np.flatnonzero(data["mask"].any(axis=1)):
            found.append(jax.tree.map(lambda x, i=i: x[i], data))
    return found


def test_opsd_resamples_until_its_rows_are_full(config, task, model, collector):
    section = stage_options(
        config.opsd, gate="correct", prompts=8, group_size=2, max_rows=6, resample_rounds=4
    )
    sampled = collector(lambda problem, i: problem % 50 == 0)
    stage = stage_with(opsd_lib, section, task, model, sampled)
    (batch,), metrics, *_ = stage.batches(0, None)
    right = [i for call in sampled.calls for i in call if i % 50 == 0]
    assert metrics["active_rows"] == len(all_rows(batch)) == min(6, 2 * len(right))
    assert 1 < len(sampled.calls) <= 5
    sampled.calls.clear()
    once = dataclasses.replace(section, resample_rounds=0)
    stage_with(opsd_lib, once, task, model, sampled).batches(0, None)
    assert len(sampled.calls) == 1


def test_a_stage_waits_for_verdicts_after_making_prompts(config, task, model, rollouts):
    """Prompts are made before the stage waits for outcomes, and the wait is measured."""
    late = Future()
    replies = [late, *rollouts.replies[1:]]
    pending = dataclasses.replace(rollouts, replies=replies)
    prompted = []

    def prompt(problem):
        prompted.append(problem.id)
        if len(prompted) == 16:  # all problems
            threading.Timer(0.2, late.set_result, [rollouts.replies[0]]).start()
        return task.prompt(problem)

    stage = rlvr(
        stage_options(config.rlvr), task._replace(prompt=prompt), model.policy, lambda *_: pending
    )
    _, metrics, *_ = stage.batches(0, None)
    assert 0.1 < metrics["verifier_wait_seconds"] < 5
    _, settled, *_ = rlvr(
        stage_options(config.rlvr), task, model.policy, lambda *_: rollouts
    ).batches(0, None)
    assert settled["verifier_wait_seconds"] < 0.05
    wait = "verifier_wait_seconds"
    assert {k: v for k, v in metrics.items() if k != wait} == {
        k: v for k, v in settled.items() if k != wait
    }


def test_every_reason_is_counted(config, task, model, rollouts):
    """A reason without rollouts has a count of 0, so a curve of time-outs begins at 0."""
    reasons = ["timeout", "crash", "memory", "no answer", "verifier ValueError"]
    replies = [Verdict(False, reason) for reason in reasons] + rollouts.replies[5:]
    marked = dataclasses.replace(rollouts, replies=replies)
    _, metrics, *_ = rlvr(
        stage_options(config.rlvr), task, model.policy, lambda *_: marked
    ).batches(0, None)
    counts = {k.removeprefix("verdict/"): v for k, v in metrics.items() if k.startswith("verdict/")}
    assert counts.pop("") == 27  # verdicts of the fixture have no reason
    assert counts == {
        **dict.fromkeys(["match", "mismatch", "truncated"], 0),
        **dict.fromkeys(["timeout", "crash", "memory", "no_answer", "verifier_ValueError"], 1),
    }


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A module with a divergence of the user's own, which is not imported yet."""
    (tmp_path / "own_divergences.py").write_text(
        "import jax\nimport jax.numpy as jnp\n"
        "def total_variation(*, student_logits, teacher_logits):\n"
        "    p, q = (jax.nn.softmax(x) for x in (student_logits, teacher_logits))\n"
        "    return 0.5 * jnp.abs(p - q).sum(-1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_divergences:total_variation"
    losses.DIVERGENCES.pop("own_divergences:total_variation", None)
    sys.modules.pop("own_divergences", None)


def test_a_divergence_of_ones_own_is_named_in_the_config(config, own_module):
    config.opsd.loss.divergence = own_module
    options = stage_options(config.opsd).loss_options()
    options.check()
    student, teacher = np.log([[[0.5, 0.5]]]), np.log([[[0.9, 0.1]]])
    loss = losses.opsd(
        student=student,
        teacher=teacher,
        mask=np.ones((1, 1), bool),
        outcomes=(np.array([True]), np.array([False]), np.array([False])),
        options=options,
    )
    assert float(loss.mean) == pytest.approx(0.4)
    config.opsd.loss.divergence = f"{own_module}, reverse_kl, jsd"
    assert stage_options(config.opsd).loss_options().divergences[0] == own_module


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing:of", "config.opsd.loss.divergence: 'nothing:of' cannot be imported"),
        (
            "json:dumps",
            "config.opsd.loss.divergence is 'json:dumps'; expected the name of a function of "
            "student_logits and teacher_logits",
        ),
        ("total", "expected one of reverse_kl"),
    ],
)
def test_a_name_that_is_no_divergence_is_refused(config, name, message):
    config.opsd.loss.divergence = name
    with pytest.raises(config_lib.ConfigError, match=message):
        parse_run(config)
    assert name not in losses.DIVERGENCES


def test_a_divergence_that_only_a_directory_names_is_not_imported(config, own_module, tmp_path):
    config.opsd.loss.divergence = own_module
    with names_from("config.json", []), pytest.raises(config_lib.ConfigError, match="--trust own_"):
        parse_run(config)
    assert "own_divergences" not in sys.modules
    with names_from("config.json", ["own_divergences"]):
        parse_run(config)
