"""Functions that all stages with rollouts share: sampling, rows for batches, and metrics."""

from __future__ import annotations

import dataclasses
import zlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import grain
import numpy as np

from opsd_jax.data.task import Task
from opsd_jax.policy import Params
from opsd_jax.rollout import carry, sampling
from opsd_jax.rollout.carry import Carried
from opsd_jax.rollout.collect import Collector, Rollouts, concatenate
from opsd_jax.rollout.diagnosis import Diagnosis, diagnose
from opsd_jax.stages.algorithm import Curve, DataSample, Responses
from opsd_jax.stages.batch import useful_fraction
from opsd_jax.stages.options import RolloutOptions
from opsd_jax.stages.packing import Lengths
from opsd_jax.stages.parts import Parts, Sampling
from opsd_jax.training.stage import Batch, StepData
from opsd_jax.verify.outcomes import Outcomes
from opsd_jax.verify.verdict import REASONS

ROLLOUTS = "rollouts"  # name of their `Sampling`, which a plan file has too

# (step, params) -> the rollouts of the step. With `options.carry_over`, the third argument has the
# rollouts that go on from the step before, and the result those that go on in the next one.
RollOut = Callable[..., Rollouts]

# How far the sampler is from the policy: in 8 bits, and with rollouts that are carried over.
SAMPLER_CURVES = (
    Curve("sampler_drift", "sampler drift, nats a token"),
    Curve("staleness", "staleness, steps"),
)


def rollout_sampling(options: RolloutOptions, task: Task | None = None) -> tuple[Sampling, ...]:
    """Returns a tuple with one `Sampling`, which describes the rollouts of a training step."""
    del task  # the lengths come from the options
    return (
        Sampling(
            name=ROLLOUTS,
            slots_field="slots",
            response_tokens_field="response_tokens",
            slots=options.slots,
            group_size=options.group_size,
            rollouts=options.in_flight * options.group_size,
            prompt_tokens=options.prompt_tokens,
            response_tokens=options.response_tokens,
            samples=options.rollouts,
            carries_over=options.carry_over > 0,
            speculation=options.speculation,
            pool_tokens=options.pool_tokens,
        ),
    )


def no_rollouts(options: RolloutOptions) -> Carried | None:
    """Returns what the first step carries over: nothing. None if steps never carry over."""
    if not options.carry_over:
        return None
    return carry.empty(options.carry_over, options.group_size, options.response_tokens)


def check_prompts(options: RolloutOptions, name: str, data: DataSample) -> None:
    """Raises ConfigError if a training prompt is longer than `prompt_tokens`."""
    task = data.task
    data.check_fits(f"{name}.prompt_tokens", options.prompt_tokens, task.train, task.prompt)


def student_lengths(
    options: RolloutOptions, count: int, responses: Responses
) -> tuple[list[int], list[Lengths]]:
    """Returns the lengths that a plan assumes for the responses and the student's sequences.

    A sequence is a prompt of `prompt_tokens` tokens and its response without the last token.

    Args:
      options: the options of the stage.
      count: number of rollouts.
      responses: returns assumed lengths of responses.

    Returns:
      `(response lengths, [Lengths])`, for `Algorithm.step_rows`.
    """
    targets = responses(count, options.response_tokens).tolist()
    return targets, [{"student": options.prompt_tokens + n - 1} for n in targets]


def make_roll_out(
    options: RolloutOptions,
    parts: Parts,
    *,
    capacity: int,
    trains: Callable[[Outcomes], np.ndarray],
) -> RollOut:
    """Compiles an engine, and returns a function that samples and verifies a step's rollouts.

    Args:
      options: the options of the stage.
      parts: the parts of the run.
      capacity, trains: as in `step_rollouts`.
    """
    (rollouts,) = rollout_sampling(options)
    engine = rollouts.engine(parts.engines)
    collector = Collector(engine, parts.task, parts.pool, options.group_size)
    common: dict[str, Any] = {"vocab_size": parts.model.vocab_size, "poll": parts.poll}
    sampled = (options, parts.task, collector, parts.seed)
    if options.carry_over:
        roll_out = carrying_rollouts(*sampled, **common)
    else:
        roll_out = step_rollouts(*sampled, capacity=capacity, trains=trains, **common)

    def measured(*arguments: Any) -> Rollouts:
        before = engine.decoding
        rollouts = roll_out(*arguments)
        return dataclasses.replace(rollouts, decoding=engine.decoding.since(before))

    return measured


def step_rollouts(
    options: RolloutOptions,
    task: Task,
    collector: Collector,
    seed: int,
    *,
    vocab_size: int,
    capacity: int,
    trains: Callable[[Outcomes], np.ndarray],
    poll: Callable[[], None] = lambda: None,
) -> RollOut:
    """Returns a function `(step, params) -> Rollouts` that samples and verifies rollouts.

    The problems and the random numbers depend only on (seed, step), not on the number of hosts.

    Dynamic sampling (DAPO, arXiv 2503.14476): when fewer than `capacity` rollouts train, up to
    `options.resample_rounds` further rounds roll out other problems. These come from another stream
    than the epoch's. A round has just enough problems to fill the step if all its rollouts train.

    Args:
      options: the options of the stage.
      task: the data.
      collector: samples and verifies rollouts.
      seed: the seed of the stage.
      vocab_size: the vocabulary size of the model.
      capacity: the number of rollouts that a step trains on.
      trains: outcomes of N rollouts -> whether each trains, bool [N].
      poll: called while sampling; an exception that it raises ends the sampling.
    """

    other_seed = zlib.crc32(f"{seed}/resampled".encode()) >> 1
    problems, others = _stream(task, seed), _stream(task, other_seed)
    sampling_params = _sampling_params(options, task, vocab_size)

    def sample(params: Params, chosen: list, seed: int, draw: int) -> Rollouts:
        key = sampling.folded_key(seed, draw)
        return collector(params, chosen, key=key, sampling_params=sampling_params, poll=poll)

    def roll_out(step: int, params: Params) -> Rollouts:
        first = step * options.prompts
        chosen = [problems[first + i] for i in range(options.prompts)]
        rollouts = sample(params, chosen, seed, step)
        for again in range(options.resample_rounds):
            missing = capacity - int(trains(rollouts.judged.outcomes).sum())
            if missing <= 0:
                break
            draw = step * options.resample_rounds + again
            there = {problem.id for problem in rollouts.problems}
            wanted = -(-missing // options.group_size)  # at most options.prompts
            drawn = [others[draw * options.prompts + i] for i in range(wanted)]
            fresh = [*{p.id: p for p in drawn if p.id not in there}.values()]
            if not fresh:
                break
            rollouts = concatenate([rollouts.settled(), sample(params, fresh, other_seed, draw)])
        return rollouts

    return roll_out


def _stream(task: Task, seed: int) -> grain.MapDataset:
    """Returns the endless stream of training problems for a seed."""
    return task.stream(seed) if task.stream else task.train.shuffle(seed=seed).repeat()


def _sampling_params(
    options: RolloutOptions, task: Task, vocab_size: int
) -> sampling.SamplingParams:
    """Returns the distribution that a stage samples its rollouts from."""
    return sampling.params(vocab_size, stop=task.tokenizer.eos_ids, temperature=options.temperature)


def carrying_rollouts(
    options: RolloutOptions,
    task: Task,
    collector: Collector,
    seed: int,
    *,
    vocab_size: int,
    poll: Callable[[], None] = lambda: None,
) -> RollOut:
    """Returns a function that samples a step's rollouts, and carries unfinished ones over.

    `options.prompts + options.carry_over` groups are in flight. The step ends once
    `options.prompts` of them have ended, those that began `options.max_staleness` steps ago among
    them. The others go on in the next step, with its parameters and its random numbers. Short
    groups end first, so the first steps of a stage have shorter responses than the later ones.

    The function is `(step, params, carried) -> Rollouts`. It depends on nothing but its arguments.

    Args:
      options, task, collector, seed, vocab_size, poll: as in `step_rollouts`.
    """
    problems = _stream(task, seed)
    sampling_params = _sampling_params(options, task, vocab_size)

    def roll_out(step: int, params: Params, carried: Carried) -> Rollouts:
        groups = carry.unpack(carried)
        first = step * options.prompts + (options.carry_over if groups else 0)
        new = range(first, first + options.in_flight - len(groups))
        groups += [carry.Group(place, step) for place in new]
        chosen = [problems[group.place] for group in groups]
        due = [g for g in groups if step - g.began >= options.max_staleness]
        trained, others = collector.some(
            params,
            chosen,
            [group.responses for group in groups],
            wanted=options.prompts,
            first=min(len(due), options.prompts),
            key=sampling.folded_key(seed, step),
            sampling_params=sampling_params,
            poll=poll,
        )
        staleness = [step - groups[i].began for i in trained]
        left = [groups[i]._replace(responses=others[i]) for i in sorted(others)]
        return dataclasses.replace(
            concatenate([*trained.values()]),
            staleness=np.repeat(staleness, options.group_size),
            carried=carry.pack(left, carried),
        )

    return roll_out


def student_rows(
    rollouts: Rollouts, task: Task, group_size: int
) -> Callable[[int], dict[str, Any]]:
    """Returns a function that maps the index of a rollout to its row for `pack`.

    The prompts are made immediately, while the verifier is still working. A row has the prompt, the
    response and the log-probabilities.
    """
    prompts = {p.id: task.prompt(p) for p in rollouts.problems[::group_size]}
    return lambda i: {
        "student": prompts[rollouts.problems[i].id],
        "response": rollouts.responses[i],
        "behaviour_logprobs": rollouts.sampling_logprobs[i],
    }


def rollout_metrics(rollouts: Rollouts, group_size: int) -> dict[str, float]:
    """Returns the metrics of a step's rollouts, such as the mean reward and length.

    They include the reward, the length in tokens, the fractions of the outcomes, the number of
    problems whose rollouts are all correct or all incorrect, and the number of verdicts by reason.
    """
    verdicts, (correct, incorrect, truncated), wait_seconds = rollouts.judged
    lengths = rollouts.lengths
    by_problem = correct.reshape(-1, group_size).mean(axis=1)
    reasons = Counter(dict.fromkeys(REASONS, 0))
    reasons.update(verdict.reason for verdict in verdicts)
    return {
        "reward": float(correct.mean()),
        "length": float(lengths.mean()),
        "incorrect": float(incorrect.mean()),
        "truncated": float(truncated.mean()),
        "tokens": float(lengths.sum()),
        "problems": float(len(by_problem)),
        "groups_all_correct": float(np.sum(by_problem == 1)),
        "groups_all_incorrect": float(np.sum(by_problem == 0)),
        "verifier_wait_seconds": wait_seconds,
        **_staleness(rollouts.staleness),
    } | {f"verdict/{reason.replace(' ', '_')}": float(reasons[reason]) for reason in reasons}


def _staleness(steps: np.ndarray | None) -> dict[str, float]:
    """Returns metrics of the numbers of steps, int [N], for which rollouts were carried over."""
    if steps is None:
        return {}
    return {"staleness": float(steps.mean()), "staleness_max": float(steps.max())}


def diagnosis(
    rollouts: Rollouts, task: Task, options: RolloutOptions
) -> Callable[[str], Diagnosis]:
    """Returns a function that maps the name of the stage to a diagnosis of verified rollouts."""
    verdicts, outcomes, _ = rollouts.judged
    return lambda name: diagnose(
        [verdict.reason for verdict in verdicts],
        int(outcomes.correct.sum()),
        lambda i: task.begun + task.tokenizer.decode(rollouts.responses[i].tolist()),
        section=name,
        response_tokens=options.response_tokens,
        unanswered=task.unanswered,
    )


def step_data(
    rollouts: Rollouts,
    task: Task,
    options: RolloutOptions,
    batches: list[Batch],
    metrics: dict[str, float] | None = None,
) -> StepData:
    """Returns the data of a step with rollouts, whose metrics are theirs and `metrics`."""
    return StepData(
        batches,
        rollout_metrics(rollouts, options.group_size)
        | (metrics or {})
        | {"useful_tokens": useful_fraction(batches)},
        group_records(rollouts, options.group_size),
        diagnosis(rollouts, task, options),
        rollouts.carried,
        rollouts.decoding,
    )


def group_records(rollouts: Rollouts, group_size: int) -> list[dict[str, Any]]:
    """Returns a JSON-ready record for each problem, with the number of its correct rollouts."""
    correct = rollouts.judged.outcomes.correct.reshape(-1, group_size).sum(axis=1)
    return [
        {
            "problem": problem.id,
            **({"source": problem.source} if problem.source else {}),
            "correct": int(right),
            "rollouts": group_size,
        }
        for problem, right in zip(rollouts.problems[::group_size], correct, strict=True)
    ]
