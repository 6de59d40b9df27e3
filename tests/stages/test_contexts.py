"""Privileged contexts: the context of each rollout, the teacher's prompt, and the alignment."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_config
import tiny_model
import tiny_tokenizer
import tokenizers
from tiny_config import stage_options

from opsd_jax import config as config_lib
from opsd_jax import losses
from opsd_jax.config.run_options import parse_run
from opsd_jax.data import contexts, text
from opsd_jax.data.contexts import Attempt, Context
from opsd_jax.problem import DataError, Problem
from opsd_jax.rollout.collect import Rollouts
from opsd_jax.rollout.engine import STOP_EOS, EndedRollouts, Response
from opsd_jax.run import checks
from opsd_jax.stages import opsd
from opsd_jax.stages.memos import Memos, memo_sampling
from opsd_jax.stages.privileged import ContextFinder, reminder_places
from opsd_jax.verify.verdict import Verdict

PROBLEM = Problem("a", "What is 12 + 34?", "12 + 34 is 46.", "46", extra={"hint": " carry \n"})
GROUP = [
    Attempt("<think>long</think> It is 46.", 9, True),
    Attempt("<think>short</think> So 46.", 5, True),
    Attempt("It is 47.", 3, False),
    Attempt("<think>hm", 4, True),
    Attempt("46 too.", 5, True),
]


def test_contexts_from_the_columns_of_a_problem():
    assert contexts.solution(PROBLEM, 0, ()) == "12 + 34 is 46."
    assert contexts.solution(PROBLEM._replace(solution=""), 0, ()) is None
    assert contexts.answer(PROBLEM, 0, ()) == "46"
    assert contexts.answer(PROBLEM._replace(answer=""), 0, ()) is None
    assert contexts.column("hint")(PROBLEM, 0, ()) == "carry"
    assert contexts.column("nosuch")(PROBLEM, 0, ()) is None
    assert contexts.nothing(PROBLEM, 0, ()) == ""


@pytest.mark.parametrize(
    ("which", "thinking", "rollout", "expected"),
    [
        ("first", False, 0, "So 46."),
        ("first", False, 1, "It is 46."),
        ("first", True, 1, "<think>long</think> It is 46."),
        ("shortest", False, 0, "So 46."),  # unfinished thinking leaves no text to show
        ("shortest", False, 1, "46 too."),
        ("shortest", True, 0, "<think>hm"),
        ("shortest", False, 2, "So 46."),  # an incorrect rollout learns from a correct one
    ],
)
def test_a_correct_sibling(which, thinking, rollout, expected):
    assert contexts.sibling(which, thinking=thinking)(PROBLEM, rollout, GROUP) == expected


def test_the_only_correct_rollout_has_no_sibling():
    find = contexts.sibling()
    assert find(PROBLEM, 0, [GROUP[0], GROUP[2]]) is None
    assert find(PROBLEM, 1, [GROUP[0], GROUP[2]]) == "It is 46."
    assert find(PROBLEM, 0, [GROUP[2], GROUP[2]]) is None


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A Qwen3-like tokenizer and a dozen problems, one without a solution."""
    root = tmp_path_factory.mktemp("model")
    tiny_tokenizer.write(root, "qwen3")
    lines = [
        f'{{"problem": "What is {i} + 3?", "answer": "{i + 3}", "hint": "count on from {i}"'
        + (f', "solution": "We add 3 to {i}. That is {i + 3}."}}' if i else "}")
        for i in range(12)
    ]
    (root / "train.jsonl").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture
def config(directory):
    config = tiny_config.quickstart()
    with config.unlocked():
        config.task = "opsd_jax.data.text:task"
        config.data.train.sums = config_lib.source(directory / "train.jsonl", extra=("hint",))
        config.data.heldout_problems = 2
        config.data.tokenizer = str(directory)
        config.opsd.update({"prompt_tokens": 120, "teacher_prompt_tokens": 400, "gate": "all"})
        config.opsd.update({"prompts": 3, "group_size": 2, "max_rows": 0, "buckets": (160,)})
        config.opsd.teacher_buckets = ()
        config.opsd.update({"microbatch": 4, "response_tokens": 40, "context_column": "hint"})
    return config


@pytest.fixture
def task(config):
    return text.task(config.data)


def rollouts_of(task, responses, verdicts, per_problem=2):
    problems = [task.train[i] for i in range(len(task.train)) if task.train[i].solution]
    encoded = [
        [*task.tokenizer.encode(response), task.tokenizer.eos_ids[0]] for response in responses
    ]
    return Rollouts(
        problems=[problems[i // per_problem] for i in range(len(responses))],
        responses=[np.array(ids, np.int32) for ids in encoded],
        sampling_logprobs=[np.full(len(ids), -1, np.float32) for ids in encoded],
        model_logprobs=[np.full(len(ids), -2, np.float32) for ids in encoded],
        truncated=np.zeros(len(responses), bool),
        replies=[Verdict(right, "") for right in verdicts],
    )


RESPONSES = [
    "<think>Hm. Let x be 3. Wait, check.</think>It is 4.",
    "<think>So</think> 46.",
    "It is 47.",
    "However",
    "It is \\boxed{9}. Perhaps.",
    "That is 12",
]
RIGHT = [True, True, False, True, False, False]


@pytest.fixture
def rollouts(task):
    return rollouts_of(task, RESPONSES, RIGHT)


@pytest.fixture
def decoded(directory):
    """`token ids -> text`, with the special tokens that the package's tokenizer leaves out."""
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    return functools.partial(tokenizer.decode, skip_special_tokens=False)


def taught(config, task, rollouts, *kinds, wanted=range(6), capacity=6, memos=None):
    with config.unlocked():
        config.opsd.contexts = kinds
    finder = ContextFinder(stage_options(config.opsd), task, 2, memos)
    return finder(0, None, rollouts, wanted, capacity=capacity)


def test_each_kind_has_its_own_wording_in_the_users_turn(config, task, rollouts, decoded):
    end = "<|im_end|>\n<|im_start|>assistant\n"
    for kind, shown in {
        "solution": "Here is a reference solution:\nWe add 3 to",
        "answer": "The correct final answer is ",
        "sibling": "Here is a correct solution:\n46.",
        "concise": "Think as briefly as you can",
        "column": "\n\ncount on from ",
    }.items():
        rows, metrics = taught(config, task, rollouts, kind)
        prompt_text = decoded(rows[0]["teacher"])
        question = rollouts.problems[0].question
        assert prompt_text.startswith(f"<|im_start|>user\n{question}\n\n")
        assert shown in prompt_text
        assert prompt_text.endswith(f"within \\boxed{{}}.{end}")
        assert prompt_text.count("<|im_start|>") == 2  # nothing in the assistant's turn
        assert "{context}" not in prompt_text
        assert metrics[f"context/{kind}"] == len(rows)


def test_kind_none_gives_the_students_prompt(config, task, rollouts):
    rows, metrics = taught(config, task, rollouts, "none")
    for i, row in rows.items():
        assert row["teacher"] == task.prompt(rollouts.problems[i])
    assert metrics == {"no_context": 0, "context_cut": 0, "context/none": 6}


def test_a_rollout_without_a_context_is_inactive_and_counted(config, task, rollouts):
    rows, metrics = taught(config, task, rollouts, "sibling")
    assert list(rows) == [0, 1, 2]  # 3 is the only correct one; 4 and 5 have no correct sibling
    assert metrics["no_context"] == 3
    rows, metrics = taught(config, task, rollouts, "sibling", "answer")
    assert list(rows) == list(range(6))
    assert metrics == {"no_context": 0, "context_cut": 0, "context/sibling": 3, "context/answer": 3}
    rows, metrics = taught(config, task, rollouts, "sibling", capacity=2)
    assert list(rows) == [0, 1]
    rows, metrics = taught(config, task, rollouts, "sibling", wanted=[3, 4, 1, 2], capacity=1)
    assert list(rows) == [1]
    assert metrics["no_context"] == 2


def test_the_stage_trains_on_rollouts_with_a_context(config, task, rollouts):
    with config.unlocked():
        config.opsd.contexts = ("sibling",)
    model = tiny_model.make(config.model)
    options = stage_options(config.opsd)
    stage = opsd.stage(
        options, task, model.policy, lambda *_: rollouts, ContextFinder(options, task, 2)
    )
    (batch,), metrics, *_ = stage.batches(0, None)
    assert metrics["active_rows"] == 3
    assert metrics["no_context"] == 3
    assert sum(bool(row.any()) for row in batch[0]["rows"]["mask"].reshape(-1, 160)) == 3


def test_a_context_that_is_too_long_loses_only_its_end(config, task, rollouts, decoded):
    problem = rollouts.problems[0]._replace(solution="abc " * 300)
    context = Context("solution", problem.solution)
    whole, cut = task.teacher_prompt(problem, context, 10_000)
    assert not cut
    for limit in (len(whole) - 1, 200, 150):
        ids, cut = task.teacher_prompt(problem, context, limit)
        assert cut
        assert limit - 8 < len(ids) <= limit
        prompt_text, whole_text = decoded(ids), decoded(whole)
        before = whole_text.index("abc ")
        after = whole_text[whole_text.rindex("abc ") + 4 :]
        assert prompt_text.startswith(whole_text[:before])
        assert prompt_text.endswith(after)
        assert set(prompt_text[before : len(prompt_text) - len(after)]) <= set("abc ")
    with pytest.raises(
        DataError,
        match=r"the teacher's prompt for problem sums/2 is too long: the text has \d+ tokens ev",
    ):
        task.teacher_prompt(problem, context, 40)


def test_reminders_are_at_ends_of_sentences_in_the_thinking():
    pieces = ["<think>", "Let", " x", ".", " So", " 3", ".", "14", " is", "!", "\n\n", "Hm", " a"]
    assert reminder_places(pieces, 4) == [4, 11]  # 7 would be inside 3.14
    assert reminder_places(pieces, 5) == [4, 10]
    assert reminder_places(pieces, 100) == []
    closed = [*pieces[:9], "</think>", ".", " b", ".", " c", "."]
    assert reminder_places(closed, 4) == [4]
    assert reminder_places(["a"] * 20, 4) == []
    # The prompt may open the thinking. A response without thinking can have reminders anywhere.
    assert reminder_places(closed[1:], 4, thinking=True) == [3]
    assert reminder_places(closed[1:], 4) == []
    assert reminder_places(closed[10:], 2) == [1, 3]
    # No reminder is before the thinking, or after the number of a list item.
    assert reminder_places(["Hm", ".", " So", "<think>", "a", ".", " b"], 2) == [6]
    assert reminder_places(["a", "\n", "1", ".", " Add", " x"], 4) == [2]
    assert reminder_places(["So", " it", " is", " 4", "."], 5) == []  # only EOS follows


def test_reminders_do_not_change_the_ids_of_a_response(config, task, rollouts, decoded):
    """The ids keep their order, and the column of the token before an id predicts it."""
    with config.unlocked():
        config.opsd.update({"reinject_every": 4, "reminder_tokens": 30})
    rows, _ = taught(config, task, rollouts, "answer")
    assert any(row["teacher/inserts"] for row in rows.values())
    options = stage_options(config.opsd)
    stage = opsd.stage(
        options,
        task,
        tiny_model.make(config.model).policy,
        lambda *_: rollouts,
        ContextFinder(options, task, 2),
    )
    (batch,), *_ = stage.batches(0, None)
    data = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch[0]["rows"])
    reminded = 0
    numbers = {tuple(ids.tolist()): i for i, ids in enumerate(rollouts.responses)}
    seen = set()
    for at in np.flatnonzero(data["mask"].any(-1)):
        i = numbers[tuple(data["targets"][at][data["mask"][at]].tolist())]
        seen.add(i)
        tokens, positions = (data["teacher"][name][at] for name in ("tokens", "positions"))
        there = positions >= 0
        np.testing.assert_array_equal(positions[there], np.arange(there.sum()))
        columns = data["teacher"]["columns"][at][data["mask"][at]][:-1] + 1
        np.testing.assert_array_equal(tokens[columns], rollouts.responses[i][:-1])
        others = np.delete(np.flatnonzero(there), np.searchsorted(np.flatnonzero(there), columns))
        prompt_text = decoded(tokens[others].tolist())
        known = decoded(rows[i]["teacher"])
        assert prompt_text.startswith(known)
        for reminder in prompt_text[len(known) :].split("Wait, I recall this.")[1:]:
            assert reminder.startswith(
                f" The correct final answer is {rollouts.problems[i].answer}"
            )
            reminded += 1
    assert seen == set(range(6))
    assert reminded == sum(len(row["teacher/inserts"]) for row in rows.values())


@pytest.mark.parametrize("kind", contexts.CONTEXTS)
@pytest.mark.parametrize("every", [0, 4])
def test_only_the_context_makes_a_divergence(config, task, rollouts, kind, every):
    """The model reads only the last token, so it sees no context. For any lengths of prompts,
    responses and reminders, only tokens right after a reminder may have a divergence.
    """
    with config.unlocked():
        config.opsd.update({"reinject_every": every, "reminder_tokens": 250, "contexts": (kind,)})
        config.model.vocab_size = task.tokenizer.vocab_size
    model = tiny_model.make(config.model)
    params = model.init(jax.random.key(0))
    written = [task.tokenizer.encode(f"Memo {i}. " * i) for i in range(1, 7)]
    memos = memos_of(config, task, Writer(written), Writer([]))
    options = stage_options(config.opsd)
    finder = ContextFinder(options, task, 2, memos)
    stage = opsd.stage(options, task, model.policy, lambda *_: rollouts, finder)
    (batch,), metrics, *_ = stage.batches(0, None)
    assert metrics["active_rows"] == (3 if kind == "sibling" else 6)
    for bucket in batch:
        for m in range(int(bucket["count"])):
            rows = jax.tree.map(lambda x, m=m: x[m], bucket["rows"])
            out = token_divergence(model, params, rows)
            reminded = np.zeros_like(rows["mask"])
            if every:
                gaps = np.diff(rows["teacher"]["columns"], axis=1, prepend=0) > 1
                reminded = gaps & rows["mask"] & np.roll(rows["mask"], 1, axis=1)
            np.testing.assert_array_equal(out[~reminded], 0)
            if every and reminded.any():
                assert (out[reminded & rows["mask"]] > 1e-3).any()


def token_divergence(model, params, rows):
    heads = [
        opsd.response_head(model.policy, params, jax.tree.map(jnp.asarray, rows[name]))
        for name in ("student", "teacher")
    ]
    loss = losses.opsd(
        student=heads[0],
        teacher=heads[1],
        mask=jnp.asarray(rows["mask"]),
        outcomes=tuple(
            jnp.asarray(rows[name] > 0) for name in ("correct", "incorrect", "truncated")
        ),
        options=losses.OPSD(gate=losses.GATES["all"]),
    )
    return np.asarray(loss.tokens["divergence"])


def test_the_control_has_no_divergence_in_a_model_that_sees_everything(config, task, rollouts):
    """The padded lengths and the places of the prompts differ, so only float32 rounding remains."""
    from opsd_jax.models import decoder

    with config.unlocked():
        config.opsd.contexts = ("none",)
        config.model.update({"vocab_size": task.tokenizer.vocab_size, "num_layers": 2})
        config.model.scan_unroll = 1
    model = decoder.from_config(config.model)
    params = jax.tree.map(lambda x: 3 * x, model.init(jax.random.key(0)))
    made = lambda options: opsd.stage(
        options, task, model.policy, lambda *_: rollouts, ContextFinder(options, task, 2)
    )
    (batch,), *_ = made(stage_options(config.opsd)).batches(0, None)
    rows = jax.tree.map(lambda x: x[0], batch[0]["rows"])
    assert rows["teacher"]["tokens"].shape != rows["student"]["tokens"].shape
    assert np.abs(token_divergence(model, params, rows)).max() < 1e-5
    shown = stage_options(config.opsd, contexts=("solution",))
    (batch,), *_ = made(shown).batches(0, None)
    rows = jax.tree.map(lambda x: x[0], batch[0]["rows"])
    assert token_divergence(model, params, rows).max() > 1e-2


class Writer:
    """A fake engine that returns given replies and records its prompts. As in a real engine, the
    responses end in another order than the prompts, here in reverse and two at a time.
    """

    def __init__(self, replies):
        self.replies, self.asked, self.draws = list(replies), [], []

    def __call__(self, params, prompts, ids, *, key, sampling_params, poll):
        self.params, self.sampling_params = params, sampling_params
        poll()
        self.asked += prompts
        self.draws += [(str(jax.random.key_data(key)), rollout_id) for (rollout_id,) in ids]
        replies, self.replies = self.replies[: len(prompts)], self.replies[len(prompts) :]
        made = [
            Response(i, 0, np.array(tokens), np.zeros(len(tokens)), np.zeros(len(tokens)), STOP_EOS)
            for i, tokens in enumerate(replies)
        ]
        assert len(made) == len(prompts)
        for start in range(0, len(made), 2):
            yield EndedRollouts(made[::-1][start : start + 2], lambda: True)


def memos_of(config, task, write, close, seed=0):
    return Memos(config.opsd.memo, task, seed, task.tokenizer.vocab_size, write, close)


def test_memos(config, task, rollouts, decoded):
    encode, eos = task.tokenizer.encode, task.tokenizer.eos_ids[0]
    write = Writer(
        [
            [*encode("<think>Hm.</think>\n\nAdd 3."), eos],
            encode("<think>and so on and on"),
            [*encode("<think>I stop here."), eos],  # EOS inside the thinking
            [*encode("<think>Hm.</think>  "), eos],
        ],
    )
    close = Writer([[*encode("In short: 3."), eos], [*encode("Count."), eos]])
    with config.unlocked():
        config.opsd.memo.temperature = 0.75
    memos = memos_of(config, task, write, close)
    rows, metrics = taught(
        config, task, rollouts, "memo", wanted=[0, 2, 3, 5], memos=memos, capacity=6
    )
    assert metrics == {"no_context": 1, "context_cut": 0, "context/memo": 3}
    for i, memo in {0: "Add 3.", 2: "In short: 3.", 3: "Count."}.items():
        assert f"recall:\n{memo}\nUse it" in decoded(rows[i]["teacher"])
    # Memos are requested in a dialogue that has every token of the response, with its thinking.
    for i, asked in zip([0, 2, 3, 5], write.asked, strict=True):
        problem = rollouts.problems[i]
        before = [*task.prompt(problem), *rollouts.responses[i].tolist()]
        assert asked[: len(before)] == before
        request = decoded(asked[len(before) :])
        assert request.startswith("\n<|im_start|>user\nThat is " + ("right" if RIGHT[i] else "wro"))
        assert f"the answer is {problem.answer}." in request
        assert request.endswith("<|im_end|>\n<|im_start|>assistant\n")
    # Thinking that did not end is closed, and the memo follows.
    for i, thought in {1: "<think>and so on and on", 2: "<think>I stop here."}.items():
        closed = close.asked[i - 1]
        assert closed[: len(write.asked[i])] == write.asked[i]
        assert decoded(closed[len(write.asked[i]) :]) == f"{thought}\n</think>\n\n"
    for sampling_params in (write.sampling_params, close.sampling_params):
        assert sampling_params.temperature == 0.75
        assert np.flatnonzero(sampling_params.stop).tolist() == sorted(task.tokenizer.eos_ids)


def test_a_signal_ends_the_writing_of_memos(config, task, rollouts):
    memos = Memos(
        config.opsd.memo, task, 0, task.tokenizer.vocab_size, Writer([]), Writer([]), poll=stop
    )
    with pytest.raises(RuntimeError, match="stop"):
        memos(0, "params", rollouts, [0])


def stop():
    raise RuntimeError("stop")


def test_a_memo_depends_on_seed_step_and_place(config, task, rollouts):
    """It depends on nothing else, and no two memos of a step have the same random numbers."""
    eos = task.tokenizer.eos_ids[0]
    encode = task.tokenizer.encode

    def draws(seed, step, params="params"):
        write = Writer([[*encode("A memo."), eos], encode("<think>on and on")] * 3)
        close = Writer([[*encode("Closed."), eos]] * 3)
        memos_of(config, task, write, close, seed)(step, params, rollouts, range(6))
        assert write.params == close.params == params  # the current model writes
        return [*write.draws, *close.draws]

    one = draws(0, 3)
    assert one == draws(0, 3)
    assert len({*one, *draws(0, 4), *draws(1, 3)}) == 3 * len(one) == 27


def test_an_empty_memo_leaves_its_place_to_the_next_rollout(config, task, rollouts):
    eos = task.tokenizer.eos_ids[0]
    replies = [[eos], *([*task.tokenizer.encode(f"Memo {i}."), eos] for i in range(5))]
    write = Writer(replies)
    memos = memos_of(config, task, write, Writer([]))
    rows, metrics = taught(config, task, rollouts, "memo", memos=memos, capacity=2)
    assert list(rows) == [1, 2]
    assert len(write.asked) == 3
    assert len(set(write.draws)) == 3
    assert metrics["no_context"] == 1


def test_memos_of_truncated_rollouts(config, task, rollouts, decoded):
    import dataclasses

    cut = dataclasses.replace(
        rollouts,
        truncated=np.array([True] * 6),
        responses=[ids[:-1] for ids in rollouts.responses],
    )
    write = Writer([[*task.tokenizer.encode("Be brief."), task.tokenizer.eos_ids[0]]])
    memos = memos_of(config, task, write, Writer([]))
    taught(config, task, cut, "memo", wanted=[1], memos=memos)
    request = decoded(write.asked[0][len(task.prompt(cut.problems[1])) :])
    assert request.startswith("<think>So</think> 46.<|im_end|>\n<|im_start|>user\nYou ran out of ")


def test_without_a_memo_the_next_kind_is_tried(config, task, rollouts):
    write = Writer([[task.tokenizer.eos_ids[0]], task.tokenizer.encode("Add.")])
    memos = memos_of(config, task, write, Writer([]))
    rows, metrics = taught(
        config, task, rollouts, "sibling", "memo", "answer", wanted=[1, 3, 4], memos=memos
    )
    assert list(rows) == [1, 3, 4]
    assert len(write.asked) == 2  # 1 has a sibling
    assert metrics["context/answer"] == metrics["context/memo"] == metrics["context/sibling"] == 1


def test_memos_fit_the_lengths_of_their_engines(config, task):
    memo = config.opsd.memo
    write, close = memo_sampling(memo, 120, 40, 6, task)
    assert write.prompt_tokens == 120 + 40 + memo.request_tokens
    assert write.response_tokens == memo.tokens
    end = len(task.end_thinking)
    assert close.prompt_tokens == write.prompt_tokens + memo.tokens + end
    assert close.response_tokens == memo.close_tokens
    assert not write.continues
    assert close.continues
    with config.unlocked():
        config.opsd.memo.request_tokens = 10
    rollouts = rollouts_of(task, RESPONSES, RIGHT)
    memos = memos_of(config, task, None, None)
    with pytest.raises(
        DataError, match=r"problem sums/2 has \d+ tokens; memo.request_tokens is 10"
    ):
        memos(0, None, rollouts, [0])


def shout(problem, rollout, group):
    """A context function that a user could write."""
    return problem.question.upper() if group[rollout].correct else None


def test_a_context_function_of_the_user(config, task, rollouts, decoded):
    rows, metrics = taught(config, task, rollouts, "test_contexts:shout")
    assert list(rows) == [0, 1, 3]
    assert "\n\nWHAT IS " in decoded(rows[0]["teacher"])
    assert metrics["context/column"] == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"contexts": ()},
            r"config.opsd.contexts is \(\); expected a tuple of kinds among solutio",
        ),
        ({"contexts": ("solutions",)}, r"contexts is \('solutions',\); expected a tuple of kinds"),
        (
            {"contexts": ("sibling",)},
            "group_size is 1; expected at least 2, because kind 'sibling'",
        ),
        (
            {"contexts": ("column",)},
            "context_column is ''; expected the name of one of the sources",
        ),
        (
            {"sibling": "longest"},
            "config.opsd.sibling is 'longest'; expected 'shortest' or 'first'",
        ),
        ({"reminder_tokens": 0}, "config.opsd.reminder_tokens is 0; expected at least 1"),
        (
            {"teacher": {"kind": "wise"}},
            "config.opsd.teacher.kind is 'wise'; expected one of 'frozen'",
        ),
        (
            {"teacher": {"kind": "ema", "rate": 0.0}},
            r"teacher.rate is 0.0; expected a number in \(0",
        ),
        ({"teacher": {"every": 0}}, "config.opsd.teacher.every is 0; expected at least 1"),
    ],
)
def test_invalid_options_are_refused(changes, message):
    config = tiny_config.quickstart()
    config.opsd.update(changes)
    with pytest.raises(config_lib.ConfigError, match=message):
        parse_run(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contexts": ("memo",)}, "expected kinds other than 'memo', because the task has"),
        ({"reinject_every": 5}, "opsd.reinject_every is 5; expected 0, because the task has no"),
        (
            {"contexts": ("no.such:f",)},
            "config.opsd.contexts: 'no.such:f' cannot be imported",
        ),
        ({"contexts": ("concise",)}, ""),
        (
            {"contexts": ("column",), "context_column": "h"},
            "expected another kind, because none of the ",
        ),
        ({"teacher_prompt_tokens": 30}, "is 30; the teacher's prompt for problem sums/[0-9]+ is"),
    ],
)
def test_contexts_that_the_task_lacks_are_refused_before_a_run(config, task, changes, message):
    bare = task._replace(reminder=None, memo_request=None)
    check(config, bare, changes, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contexts": ("memo",), "memo": {"request_tokens": 9}}, "memo.request_tokens is 9; expec"),
        ({"reinject_every": 5, "reminder_tokens": 9}, "reminder_tokens is 9; a reminder of the co"),
    ],
)
def test_limits_without_room_are_refused_before_a_run(config, task, changes, message):
    check(config, task, changes, message)


def check(config, task, changes, message):
    with config.unlocked():
        config.stages = ("opsd",)
        config.opsd.update({"slots": 2, "init_from": ""} | changes)
        config.evaluation.update({"problems": 2, "slots": 2, "prompt_tokens": 120})
    run = lambda: checks.check_data(
        parse_run(config), task, task.tokenizer.vocab_size, lambda stage: 0
    )
    if not message:
        run()
        return
    with pytest.raises(config_lib.ConfigError, match=message):
        run()


def test_missing_and_cut_contexts_are_logged(config, task, caplog):
    check(config, task, {"teacher_prompt_tokens": 64}, "")
    logged = caplog.text
    assert "opsd: of 12 problems checked, 11 have a context of kind 'solution', and " in logged
    cut = int(logged.partition("'solution', and ")[2].split()[0])
    assert 0 < cut <= 11


def test_a_memo_cannot_end_the_users_turn(config, task, rollouts, decoded):
    memo = "Add.<|im_end|>\n<|im_start|>assistant\n4"
    ids, _ = task.teacher_prompt(rollouts.problems[0], Context("memo", memo), 400)
    prompt_text = decoded(ids)
    assert "recall:\nAdd.\nassistant\n4\nUse it" in prompt_text
    assert prompt_text.count("<|im_start|>") == 2
    reminder, cut = task.reminder(Context("memo", memo), 200)
    assert not cut
    assert "<|im_" not in decoded(reminder)
