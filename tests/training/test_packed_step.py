"""Rows that several responses share have the loss and the gradient of one response per row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import MESHES, opsd_row

from opsd_jax import losses
from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.stages import batch as batch_lib
from opsd_jax.stages import opsd, rlvr, sft
from opsd_jax.stages.packing import Packing
from opsd_jax.stages.teacher import frozen, make_head
from opsd_jax.training import state as state_lib
from opsd_jax.training import step as step_lib
from opsd_jax.verify.outcomes import Outcomes

GATE = (1.0, 0.5, 0.0)  # truncated rollouts are in the batch, with weight 0
BUCKETS = [{"student": 96, "teacher": 144}]

# An optimizer that changes nothing and keeps the gradient as its state.
GRADIENT = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda gradient, _, params: (jax.tree.map(jnp.zeros_like, params), gradient),
)


@pytest.fixture(scope="module")
def rows(task):
    """Twelve responses of different lengths, most with reminders in the teacher's copy."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(12):
        row = opsd_row(task, i, rng)
        length = len(row["response"])
        rows.append(
            row
            | {
                "teacher/inserts": [(length // 2, [5, 6, 7])] if length > 3 else [],
                "behaviour_logprobs": rng.uniform(-4, -2, length).tolist(),
                "advantages": rng.normal(),
            }
        )
    return rows


def pack(rows, *, packing=None, microbatch=4, buckets=BUCKETS):
    return batch_lib.pack(
        rows,
        buckets=buckets,
        microbatch=microbatch,
        capacity=16,
        per_token=["behaviour_logprobs"],
        per_row=["advantages", *Outcomes._fields],
        pad_id=0,
        packing=packing,
    )


def make_loss(name, model, config):
    """Returns the loss of a stage, with options that aggregate and weight by response."""
    if name == "opsd":
        options = losses.OPSD(gate=GATE, position="linear", divergence="reverse_kl,jsd,reverse_kl")
        head = make_head(model.policy, config.opsd.teacher)
        return functools.partial(opsd.loss_fn, model.policy, head, options, 1.0, 0)
    if name == "sft":
        return functools.partial(sft.loss_fn, model.policy, 0)
    options = losses.PRESETS[name]
    return functools.partial(rlvr.loss_fn, model.policy, options, 0.9, 0)


@pytest.fixture(scope="module")
def start(params):
    state = state_lib.init_state(params, GRADIENT, frozen())
    return state | {"teacher": jax.tree.map(lambda x: x * 1.1, params)}


def results(step, state, batch):
    """Returns the loss as a sum and a weight, the gradient times the weight, and the metrics."""
    state, metrics = step(state, batch)
    total, weight = metrics["loss"]
    gradient = jax.tree.map(lambda g: g * jnp.where(weight == 0, 1, weight), state["opt_state"])
    counted = {k: v for k, v in metrics.items() if k not in ("grad_norm", "empty", "nonfinite")}
    return jax.device_get((total, weight, gradient, counted))


def assert_equal_up_to_rounding(got, expected):
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True
    ):
        scale = max(1e-6, float(np.abs(b).max()))
        np.testing.assert_allclose(
            a, b, rtol=1e-5, atol=1e-5 * scale, err_msg=jax.tree_util.keystr(path)
        )


@pytest.mark.parametrize(
    "name", ["opsd", "sft", "grpo", pytest.param("gspo", marks=pytest.mark.slow)]
)
def test_packed_rows_equal_rows_of_their_own(name, model, shared_config, start, rows):
    """Together, one at a time and in reverse order; with all rows, some or none active."""
    loss = make_loss(name, model, shared_config)
    step = jax.jit(step_lib.make_train_step(loss, GRADIENT))
    expected = results(step, start, pack(rows))
    batch = pack(rows, packing=Packing())
    assert sum(b["count"] * b["rows"]["mask"].shape[1] for b in batch) < len(rows)
    assert_equal_up_to_rounding(results(step, start, batch), expected)
    assert_equal_up_to_rounding(results(step, start, pack(rows[::-1], packing=Packing())), expected)
    single = [results(step, start, pack([row], packing=Packing())) for row in rows]
    summed = jax.tree.map(lambda *values: sum(values), *single)
    assert_equal_up_to_rounding(summed, expected)
    nothing = results(step, start, pack([], packing=Packing()))
    assert nothing[:2] == (0, 0)


@pytest.mark.parametrize("shape", MESHES)
def test_eight_devices_compute_packed_rows_as_one_does(model, shared_config, start, rows, shape):
    loss = make_loss("opsd", model, shared_config)
    expected = results(jax.jit(step_lib.make_train_step(loss, GRADIENT)), start, pack(rows))
    mesh = mesh_lib.make_mesh(shape)
    shardings = state_lib.state_shardings(
        start, GRADIENT, mesh_lib.tree_shardings(mesh, model.rules, start["params"]), mesh
    )
    batch = pack(rows, packing=Packing(mesh_lib.row_shards(mesh)), microbatch=8)
    batch_shardings = step_lib.batch_shardings(batch, mesh)
    step = jax.jit(
        step_lib.make_train_step(loss, GRADIENT),
        in_shardings=(shardings, batch_shardings),
        out_shardings=(shardings, None),
    )
    with jax.set_mesh(mesh):
        got = results(
            step, jax.device_put(start, shardings), jax.device_put(batch, batch_shardings)
        )
    assert_equal_up_to_rounding(got, expected)


def test_a_response_changes_no_other_loss_in_its_row(model, params, rows):
    """All values of the other responses' tokens stay the same, to the last bit."""
    teacher = jax.tree.map(lambda x: 1.1 * x, params)

    @jax.jit
    def token_losses(micro):
        return losses.opsd(
            student=batch_lib.response_head(model.policy, params, micro["student"]),
            teacher=batch_lib.response_head(model.policy, teacher, micro["teacher"]),
            mask=micro["mask"],
            outcomes=tuple(micro[outcome] > 0 for outcome in Outcomes._fields),
            starts=micro["starts"],
            options=losses.OPSD(gate=(1, 1, 1)),
        ).tokens["divergence"]

    def values(rows):
        micro = batch_lib.collate(
            [rows], {"student": 256, "teacher": 512}, microbatch=1, responses=4,
            per_row=Outcomes._fields, pad_id=0,
        )  # fmt: skip
        found = np.asarray(token_losses(micro))[0][micro["mask"][0]]
        return np.split(found, np.cumsum([len(row["response"]) for row in rows])[:-1])

    sharing = rows[:4]
    before = values(sharing)
    for changed in range(4):
        other = dict(sharing[changed])
        other["response"] = [(token + 7) % 31 + 1 for token in other["response"]]
        other["student"] = other["student"][::-1]
        after = values([*sharing[:changed], other, *sharing[changed + 1 :]])
        for i in range(4):
            assert np.array_equal(before[i], after[i]) == (i != changed)


def test_rows_behind_the_gate_cost_nothing(rows):
    """Every number of responses runs the same program, with as many rows as they need."""
    whole = pack(rows, packing=Packing())
    few = pack(rows[:3], packing=Packing())
    assert jax.tree.map(np.shape, whole) == jax.tree.map(np.shape, few)
    computed = lambda batch: sum(int(b["count"]) * b["rows"]["mask"].shape[1] for b in batch)
    assert computed(few) == 2
    assert 2 < computed(whole) < len(rows)
    assert computed(pack([], packing=Packing())) == 0
