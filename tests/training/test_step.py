"""The train step: packing, the gate, accumulation, empty and non-finite batches, meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import MESHES, opsd_row
from jax.extend.core import jaxprs_in_params

from opsd_jax import losses
from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.stages import batch as batch_lib
from opsd_jax.stages import opsd, rlvr, sft
from opsd_jax.stages.teacher import frozen, make_head
from opsd_jax.training import state as state_lib
from opsd_jax.training import step as step_lib
from opsd_jax.training.optimizer import make_optimizer
from opsd_jax.verify.outcomes import Outcomes

GATE = (1.0, 0.5, 2.0)
NO_OUTCOME = dict.fromkeys(Outcomes._fields, False)


@pytest.fixture(scope="module")
def rows(task):
    """Twelve OPSD rows of different lengths, with gate weights."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(12):
        row = opsd_row(task, i, rng)
        # The weight is the one that the gate gives its outcome.
        rows.append(
            row | {"behaviour_logprobs": [-1.0] * len(row["response"]), "weight": GATE[i % 3]}
        )
    return rows


def pack(rows, *, buckets=((32, 55), (56, 80)), microbatch=4, capacity=16):
    return batch_lib.pack(
        rows,
        buckets=[{"student": student, "teacher": teacher} for student, teacher in buckets],
        microbatch=microbatch,
        capacity=capacity,
        per_token=["behaviour_logprobs"],
        per_row=Outcomes._fields,
        pad_id=0,
    )


OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))


@pytest.fixture(scope="module")
def teacher(params):
    return jax.tree.map(lambda x: x * 1.1, params)


@pytest.fixture(scope="module")
def start(params, teacher):
    """A state with nonzero Adam moments, so that a test notices if they change."""
    state = state_lib.init_state(params, OPTIMIZER, frozen())
    gradient = jax.tree.map(jnp.ones_like, params)
    _, opt_state = OPTIMIZER.update(gradient, state["opt_state"], params)
    return state | {"opt_state": opt_state, "teacher": teacher}


@pytest.fixture(scope="module")
def loss_fn(model, shared_config):
    head = make_head(model.policy, shared_config.opsd.teacher)
    return functools.partial(opsd.loss_fn, model.policy, head, losses.OPSD(gate=GATE), 1.0, 0)


@pytest.fixture(scope="module")
def train_step(loss_fn):
    return jax.jit(step_lib.make_train_step(loss_fn, OPTIMIZER))


def assert_close(a, b, rtol=1e-5, atol=1e-6):
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol, atol, err_msg=jax.tree_util.keystr(path))


def assert_equal(a, b):
    assert_close(a, b, rtol=0, atol=0)


def microbatches(batch):
    """Yields each microbatch in use, with the padded lengths of its sequences."""
    for bucket in batch:
        for i in range(int(bucket["count"])):
            rows = jax.tree.map(lambda x, i=i: x[i], bucket["rows"])
            yield rows, {name: rows[name]["tokens"].shape[1] for name in ("student", "teacher")}


def test_packing_keeps_every_row_and_the_shapes(rows):
    batch, empty = pack(rows), pack([])
    assert jax.tree.map(np.shape, batch) == jax.tree.map(np.shape, empty)
    assert [int(b["count"]) for b in empty] == [0, 0]
    found = sorted(
        tuple(targets[mask])
        for data, _ in microbatches(batch)
        for targets, mask in zip(data["targets"], data["mask"], strict=True)
        if mask.any()
    )
    assert found == sorted(tuple(row["response"]) for row in rows)


def test_no_other_arrangement_in_order_of_length_computes_fewer_tokens():
    """Compares with all ways to split up to nine sorted rows into microbatches of up to three."""
    rng = np.random.default_rng(0)
    buckets = [{"student": length} for length in (4, 8, 10, 20)]
    for n in [*range(10)] * 3:
        rows = [{"student": [1], "response": [2] * k} for k in rng.integers(1, 20, n)]
        batch = batch_lib.pack(rows, buckets=buckets, microbatch=3, capacity=9, pad_id=0)
        sizes = [size["student"] for size in buckets]
        cost = sum(int(b["count"]) * size for b, size in zip(batch, sizes, strict=True))
        lengths = sorted(len(row["response"]) for row in rows)
        padded = [next(size for size in sizes if size >= length) for length in lengths]

        def least(end, padded=padded):
            cuts = range(max(0, end - 3), end)
            return min((least(i) + padded[end - 1] for i in cuts), default=0)

        assert cost == least(n)
        assert sum(b["rows"]["mask"].any(-1).sum() for b in batch) == n


def test_student_and_teacher_predict_the_same_response_tokens(rows):
    for data, _ in microbatches(pack(rows)):
        for i in np.flatnonzero(data["mask"].any(-1)):
            mask = data["mask"][i]
            of_teacher = data["teacher"]["columns"][i][mask]
            for name, predicting in (("student", np.flatnonzero(mask)), ("teacher", of_teacher)):
                tokens, positions = data[name]["tokens"][i], data[name]["positions"][i]
                n = (positions >= 0).sum()
                np.testing.assert_array_equal(positions[:n], np.arange(n))
                assert predicting[-1] == n - 1  # the last computed token predicts the last one
                np.testing.assert_array_equal(tokens[predicting[1:]], data["targets"][i][mask][:-1])
            np.testing.assert_array_equal(data["behaviour_logprobs"][i], np.where(mask, -1, 0))


def test_the_useful_fraction_counts_the_tokens_that_are_computed(rows):
    useful = computed = 0
    for row in rows:
        useful += len(row["student"]) + len(row["teacher"]) + 2 * len(row["response"]) - 2
    for _, lengths in microbatches(batch := pack(rows)):
        computed += 4 * sum(lengths.values())
    assert batch_lib.useful_fraction([batch]) == pytest.approx(useful / computed)
    assert batch_lib.useful_fraction([pack([])]) == 1


def test_an_empty_prompt_is_an_error(rows):
    with pytest.raises(ValueError, match="the prompt 'teacher' of a row is empty; expected at"):
        pack([rows[0] | {"teacher": []}])


def test_too_many_or_too_long_rows_are_an_error(rows):
    with pytest.raises(ValueError, match="a batch has 12 rows; expected at most its capacity, 8"):
        pack(rows, capacity=8)
    with pytest.raises(
        ValueError, match=r"a row has the lengths .* in tokens; expected at most .*30"
    ):
        pack(rows, buckets=((20, 55), (30, 80)))


def response_logits(score, params, prompt, response):
    """Computes the logits [len(response), V] of a response in a forward pass of one row."""
    ids = [*prompt, *response]
    tokens, positions = np.zeros((1, 96), np.int32), np.full((1, 96), -1, np.int32)
    tokens[0, : len(ids)], positions[0, : len(ids)] = ids, np.arange(len(ids))
    return score(params, tokens, positions)[0, len(prompt) - 1 : len(ids) - 1]


def test_loss_is_the_sum_over_single_rows(score, train_step, start, rows):
    """Computes everything after the logits in float64 NumPy."""
    total = weights = 0.0
    for row in rows:
        logs = []
        for params, prompt in (
            (start["params"], row["student"]),
            (start["teacher"], row["teacher"]),
        ):
            logits = np.asarray(response_logits(score, params, prompt, row["response"]), np.float64)
            logs.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
        kl = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1)
        total, weights = total + row["weight"] * kl.mean(), weights + row["weight"]
    _, metrics = train_step(start, pack(rows))
    assert float(metrics["loss"][1]) == weights
    np.testing.assert_allclose(metrics["loss"][0], total, rtol=1e-4)


@pytest.mark.parametrize(
    "arrangement",
    [
        {"microbatch": 2},
        {"microbatch": 16},
        {"buckets": ((56, 80),)},
        {"buckets": ((20, 40), (28, 50), (40, 70), (64, 90))},
        {"capacity": 40},
    ],
)
def test_arrangement_of_the_rows_does_not_matter(train_step, start, rows, arrangement):
    expected, _ = train_step(start, pack(rows))
    got, _ = train_step(start, pack(rows[::-1], **arrangement))
    assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_rows_without_weight_do_not_influence_the_update(train_step, start, rows):
    """The update equals that of a batch from which these rows were removed."""
    dropped = [row | NO_OUTCOME if i % 2 else row for i, row in enumerate(rows)]
    expected, _ = train_step(start, pack(rows[::2]))
    got, _ = train_step(start, pack(dropped))
    assert_close(got, expected)
    different, _ = train_step(start, pack(rows))
    with pytest.raises(AssertionError):
        assert_close(got["params"], different["params"])


def test_an_empty_context_has_no_divergence(train_step, start, rows):
    """Teacher and student have equal prompts and parameters, but different padded lengths."""
    same = [row | {"teacher": row["student"]} for row in rows]
    state = start | {"teacher": start["params"]}
    _, metrics = train_step(state, pack(same))
    assert abs(float(metrics["loss"][0])) < 1e-5
    assert float(metrics["grad_norm"][0]) < 1e-4
    _, metrics = train_step(state, pack(rows))
    assert float(metrics["loss"][0] / metrics["loss"][1]) > 1e-2


def test_the_teacher_gets_no_gradient(loss_fn, start, rows):
    micro = jax.tree.map(lambda x: x[0], pack(rows)[1]["rows"])
    loss = lambda teacher: loss_fn(start["params"], teacher, micro)[0]
    for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(start["teacher"])):
        np.testing.assert_array_equal(leaf, 0)


@pytest.mark.parametrize("rows_of", [lambda rows: [], lambda rows: [rows[0] | NO_OUTCOME]])
def test_a_batch_without_active_rows_changes_nothing_and_is_counted(
    train_step, start, rows, rows_of
):
    state, metrics = train_step(start, pack(rows_of(rows)))
    assert int(state.pop("step")) == int(start["step"]) + 1
    assert_equal(state, {k: v for k, v in start.items() if k != "step"})
    assert float(metrics["empty"][0]) == 1
    assert float(metrics["nonfinite"][0]) == 0
    assert float(metrics["loss"][1]) == 0


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(train_step, start, rows):
    broken = start | {"teacher": start["teacher"] | {"norm": jnp.full(16, jnp.nan)}}
    state, metrics = train_step(broken, pack(rows))
    assert_equal(state["params"], start["params"])
    assert_equal(state["opt_state"], start["opt_state"])
    assert float(metrics["nonfinite"][0]) == 1
    assert float(metrics["empty"][0]) == 0


def test_bfloat16_parameters_keep_their_dtype_over_steps(loss_fn, start, rows):
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), start["params"])
    state = state_lib.init_state(low, OPTIMIZER, frozen())
    dtypes = jax.tree.map(lambda x: x.dtype, state)
    train_step, traced = step_lib.make_train_step(loss_fn, OPTIMIZER), []

    @jax.jit
    def step(*arguments):
        traced.append(arguments)
        return train_step(*arguments)

    for _ in range(2):
        state, metrics = step(state, pack(rows))
        assert jax.tree.map(lambda x: x.dtype, state) == dtypes
    assert len(traced) == 1
    assert np.isfinite(float(metrics["loss"][0]))


@pytest.mark.parametrize("shape", MESHES)
def test_eight_devices_compute_the_same_step_as_one(model, loss_fn, start, rows, shape):
    """The state is sharded and donated, as in the training loop."""
    results = []
    for devices in (1, 8):
        mesh = mesh_lib.make_mesh(shape if devices > 1 else (1, 1, 1), jax.devices()[:devices])
        shardings = state_lib.state_shardings(
            start, OPTIMIZER, mesh_lib.tree_shardings(mesh, model.rules, start["params"]), mesh
        )
        state = jax.device_put(jax.tree.map(jnp.copy, start), shardings)
        batch = pack(rows, microbatch=8)
        batch_shardings = step_lib.batch_shardings(batch, mesh)
        step = jax.jit(
            step_lib.make_train_step(loss_fn, OPTIMIZER),
            donate_argnums=0,
            in_shardings=(shardings, batch_shardings),
            out_shardings=(shardings, None),
        )
        with jax.set_mesh(mesh):
            donated = state
            for _ in range(2):
                state, metrics = step(state, jax.device_put(batch, batch_shardings))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(donated["params"]))
        results.append(jax.device_get((state, metrics)))
    # Adam divides by sqrt(v), which magnifies the rounding of small gradients to 1e-4 of a step.
    assert_close(*results, rtol=1e-4, atol=1e-5)


def test_gradients_are_summed_over_data_after_all_microbatches(loss_fn, start, rows):
    """Within a shard_map over `data`, the compiler adds no sums over it."""

    def sums_over_data(jaxpr, in_loop):
        for equation in jaxpr.eqns:
            if "psum" in equation.primitive.name and "data" in equation.params["axes"]:
                yield in_loop
            for inner in jaxprs_in_params(equation.params):
                yield from sums_over_data(inner, in_loop or equation.primitive.name == "while")

    with jax.set_mesh(mesh_lib.make_mesh((2, 2, 2))):
        step = step_lib.make_train_step(loss_fn, OPTIMIZER)
        program = jax.make_jaxpr(step)(start, pack(rows, microbatch=8))
    found = [*sums_over_data(program.jaxpr, False)]
    assert found
    assert not any(found)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rlvr_gradient_equals_grpo_computed_by_hand(model, params, task, score, temperature):
    """On-policy, a token's loss is -A and its gradient is -A grad log p."""
    rng = np.random.default_rng(1)
    problems = [task.train[i] for i in range(4)]
    responses = [rng.integers(1, 32, n).tolist() for n in (3, 7, 12, 5)]
    advantages = [1.5, -0.5, 0.0, -1.0]
    rows = []
    for problem, response, advantage in zip(problems, responses, advantages, strict=True):
        prompt = task.prompt(problem)
        logits = response_logits(score, params, prompt, response) / temperature
        behaviour = jax.nn.log_softmax(logits)[np.arange(len(response)), np.array(response)]
        rows.append(
            {
                "student": prompt,
                "response": response,
                "behaviour_logprobs": np.asarray(behaviour),
                "advantages": advantage,
            }
        )
    micro = batch_lib.collate(
        [[row] for row in rows],
        {"student": 32},
        microbatch=8,
        per_token=["behaviour_logprobs"],
        per_row=["advantages"],
        pad_id=0,
    )

    def by_hand(params):
        total = 0.0
        for row in rows:
            logits = response_logits(score, params, row["student"], row["response"])
            logprobs = jax.nn.log_softmax(logits / temperature)
            picked = logprobs[np.arange(len(row["response"])), np.array(row["response"])]
            total -= row["advantages"] * picked.sum()
        return total

    options = losses.PolicyGradient(aggregation="token")
    loss = lambda params: rlvr.loss_fn(model.policy, options, temperature, 0, params, None, micro)
    (total, (weight, metrics)), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert float(weight) == 27
    expected = -sum(a * len(r) for a, r in zip(advantages, responses, strict=True))
    np.testing.assert_allclose(total, expected, rtol=1e-4)
    assert float(metrics["ratio_outside_clip"][0]) == 0
    assert_close(gradient, jax.grad(by_hand)(params), rtol=1e-3, atol=1e-4)


def test_sft_loss_is_the_cross_entropy_of_response_tokens(config, model, params, task, score):
    stage = sft.stage(config.sft, task, model.policy, seed=0)
    (batch,), *_ = stage.batches(3, None)
    again, *_ = stage.batches(3, None)
    assert_equal(batch, again[0])
    total = weight = expected = 0.0
    loss = jax.jit(stage.loss)
    for bucket in batch:
        for i in range(int(bucket["count"])):
            micro = jax.tree.map(lambda x, i=i: x[i], bucket["rows"])
            part, (tokens, _) = loss(params, None, micro)
            total, weight = total + float(part), weight + float(tokens)
            logprobs = np.asarray(
                jax.nn.log_softmax(
                    score(params, micro["student"]["tokens"], micro["student"]["positions"])
                ),
                np.float64,
            )
            for row, t in zip(*np.nonzero(micro["mask"]), strict=True):
                expected -= logprobs[row, t, micro["targets"][row, t]]
    assert (
        sum(bucket["rows"]["mask"].any(axis=-1).sum() for bucket in batch) == config.sft.batch_size
    )
    np.testing.assert_allclose(total, expected, rtol=1e-5)


def test_learning_rate_schedules(config):
    def rates(**changes):
        optimizer = config.sft.optimizer.copy_and_resolve_references()
        optimizer.update(
            {"weight_decay": 0.0, "b1": 0.0, "b2": 0.0, "clip_norm": 1e9, "learning_rate": 1.0}
            | changes
        )
        tx = make_optimizer(optimizer, updates=10)
        params = jnp.zeros(1)
        opt_state, sizes = tx.init(params), []
        for _ in range(11):  # with b1 = b2 = 0, an update is the learning rate times the sign
            updates, opt_state = tx.update(jnp.ones(1), opt_state, params)
            sizes.append(-float(updates[0]))
        return np.array(sizes)

    np.testing.assert_allclose(rates(schedule="constant", warmup=0), 1, rtol=1e-4)
    warm = rates(schedule="constant", warmup=4)
    np.testing.assert_allclose(warm, [0, 0.25, 0.5, 0.75, *[1] * 7], rtol=1e-4, atol=1e-7)
    cosine = rates(schedule="cosine", warmup=2, final_fraction=0.1)
    np.testing.assert_allclose(
        cosine[[0, 1, 2, 6, 10]], [0, 0.5, 1, 0.55, 0.1], rtol=1e-4, atol=1e-7
    )


def test_the_first_moment_may_be_in_bfloat16(config):
    """The second moment stays in float32, so an update differs by the rounding of the first."""
    updates = []
    for dtype in ("float32", "bfloat16"):
        optimizer = config.sft.optimizer.copy_and_resolve_references()
        optimizer.update({"schedule": "constant", "warmup": 0, "moment_dtype": dtype})
        tx = make_optimizer(optimizer, updates=10)
        params = jax.random.normal(jax.random.key(0), (64,))
        opt_state = tx.init(params)
        for i in range(5):
            gradient = jax.random.normal(jax.random.key(i), (64,))
            update, opt_state = tx.update(gradient, opt_state, params)
        updates.append(update)
        adam = opt_state[1][0]
        assert (adam.mu.dtype, adam.nu.dtype) == (dtype, "float32")
    scale = np.abs(updates[0]).max()
    np.testing.assert_allclose(*updates, atol=2**-7 * scale)
    assert not np.array_equal(*updates)
