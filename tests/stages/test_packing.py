"""Responses that share rows: the arrangement is deterministic, valid and needs little padding."""

import jax
import numpy as np
import pytest

from opsd_jax.config.run_options import parse_run
from opsd_jax.planning import placeholders
from opsd_jax.stages import batch as batch_lib
from opsd_jax.stages import rlvr, sft
from opsd_jax.stages.packing import Packing, arranged, shapes_of

BUCKETS = [{"student": 48, "teacher": 72}, {"student": 96, "teacher": 132}]


def rows_of(n, seed=0):
    """Returns responses of exponentially distributed lengths, with reminders for the teacher."""
    rng, rows = np.random.default_rng(seed), []
    ids = lambda n: rng.integers(1, 30, n).tolist()
    for _ in range(n):
        response = ids(int(np.clip(rng.exponential(20), 1, 64)))
        student = ids(rng.integers(1, 16))
        inserts = [(len(response) // 2, ids(3))] if len(response) > 4 else []
        rows.append(
            {
                "student": student,
                "teacher": student + ids(rng.integers(1, 16)),
                "teacher/inserts": inserts,
                "response": response,
                "behaviour_logprobs": rng.uniform(-2, -1, len(response)).tolist(),
                "weight": rng.uniform(1, 2),
            }
        )
    return rows


def lengths_of(rows):
    inserted = lambda row: sum(len(ids) for _, ids in row["teacher/inserts"])
    return [
        {
            "student": len(row["student"]) + len(row["response"]) - 1,
            "teacher": len(row["teacher"]) + len(row["response"]) + inserted(row) - 1,
        }
        for row in rows
    ]


def computed(arrangement, shapes):
    return sum(len(p) * s.rows * s.tokens for p, s in zip(arrangement, shapes, strict=True))


@pytest.mark.parametrize("n", [0, 1, 5, 40])
@pytest.mark.parametrize(("microbatch", "shards"), [(4, 1), (4, 4), (16, 2)])
@pytest.mark.parametrize("buckets", [BUCKETS, BUCKETS[1:]])
def test_every_response_has_one_place_and_every_row_fits(n, microbatch, shards, buckets):
    lengths = lengths_of(rows_of(n, seed=n))
    packing = Packing(shards)
    shapes = shapes_of(buckets, microbatch, packing)
    found = arranged(lengths, buckets, microbatch, packing)
    assert found == arranged(lengths, buckets, microbatch, packing)
    assert sorted(i for parts in found for p in parts for row in p for i in row) == [*range(n)]
    for parts, shape in zip(found, shapes, strict=True):
        assert shape.rows in (microbatch, shards)
        if shape.rows < microbatch:
            assert len(parts) < microbatch / shape.rows
        for part in parts:
            assert len(part) <= shape.rows
            for row in part:
                assert len(row) <= shape.responses
                for name, size in shape.lengths.items():
                    assert sum(lengths[i][name] for i in row) <= size
    apart = computed(arranged(lengths, buckets, microbatch), shapes_of(buckets, microbatch))
    assert computed(found, shapes) <= apart


def test_shared_rows_have_little_padding():
    """With four rows on each shard, up to three of the last microbatch are empty."""
    lengths = [
        {"student": n} for n in (np.random.default_rng(0).exponential(60, 96) + 8).astype(int)
    ]
    buckets = [{"student": 448}]
    total = sum(needed["student"] for needed in lengths)
    for microbatch, shards, least in ((4, 1, 0.97), (4, 4, 0.83), (16, 2, 0.92)):
        packing = Packing(shards)
        found = arranged(lengths, buckets, microbatch, packing)
        assert total / computed(found, shapes_of(buckets, microbatch, packing)) > least
    assert total / computed(arranged(lengths, buckets, 4), shapes_of(buckets, 4)) < 0.2


def test_a_row_has_its_responses_one_after_the_other():
    rows = rows_of(3, seed=1)
    arrays = batch_lib.collate(
        [rows[:2], rows[2:]],
        BUCKETS[1],
        microbatch=3,
        responses=4,
        per_token=["behaviour_logprobs"],
        per_row=["weight"],
        pad_id=0,
    )
    lengths = lengths_of(rows)
    np.testing.assert_array_equal(
        arrays["starts"],
        [[0, lengths[0]["student"], 96, 96], [0, 96, 96, 96], [96, 96, 96, 96]],
    )
    weights = np.float32([row["weight"] for row in rows])
    np.testing.assert_array_equal(
        arrays["weight"], [[weights[0], weights[1], 0, 0], [weights[2], 0, 0, 0], [0, 0, 0, 0]]
    )
    for name in ("student", "teacher"):
        first, second, third = (np.arange(needed[name]) for needed in lengths)
        positions = arrays[name]["positions"]
        np.testing.assert_array_equal(positions[0][positions[0] >= 0], [*first, *second])
        np.testing.assert_array_equal(positions[1][positions[1] >= 0], third)
        assert (positions[2] == -1).all()
    targets = [arrays["targets"][i][arrays["mask"][i]].tolist() for i in range(3)]
    assert targets == [rows[0]["response"] + rows[1]["response"], rows[2]["response"], []]
    for i, sharing in enumerate((rows[:2], rows[2:])):
        mask = arrays["mask"][i]
        of_teacher = arrays["teacher"]["columns"][i][mask]
        seen = arrays["teacher"]["tokens"][i][of_teacher]
        # Before each token of a response: the token before it, the reminder's or the prompt's last.
        before = []
        for row in sharing:
            inserts = dict(row["teacher/inserts"])
            last = row["teacher"][-1]
            for at, token in enumerate(row["response"]):
                before.append(inserts[at][-1] if at in inserts else last)
                last = token
        np.testing.assert_array_equal(seen, before)


def test_batches_of_any_number_of_responses_have_the_same_shapes():
    pack = lambda rows: batch_lib.pack(
        rows, buckets=BUCKETS, microbatch=4, capacity=40, per_row=["weight"], pad_id=0,
        packing=Packing(2),
    )  # fmt: skip
    shapes_in = lambda batch: jax.tree.map(np.shape, batch)
    for n in (1, 7, 40):
        batch = pack(rows_of(n))
        assert shapes_in(batch) == shapes_in(pack([]))
        assert sum(bucket["rows"]["weight"].astype(bool).sum() for bucket in batch) == n
        for bucket in batch:  # microbatches that are not counted are empty
            assert not bucket["rows"]["mask"][int(bucket["count"]) :].any()
    with pytest.raises(ValueError, match=r"a row has the lengths .* expected at most .*96"):
        pack([rows_of(1)[0] | {"response": [1] * 100}])


def test_the_demonstrations_of_a_window_are_the_same_with_less_padding(config, task, model):
    config.sft.update({"batch_size": 16, "microbatch": 4, "steps": sft.WINDOW, "packing": True})
    options = parse_run(config).sections["sft"]
    packed = sft.stage(options, task, model.policy, 0, Packing())
    apart = sft.stage(options, task, model.policy, 0)
    trained = {}
    for name, stage in (("packed", packed), ("apart", apart)):
        steps = [stage.batches(step, None) for step in range(sft.WINDOW)]
        assert jax.tree.map(np.shape, steps[0].batches[0]) == jax.tree.map(
            np.shape, stage.empty_batch
        )
        trained[name] = [
            int(bucket["rows"]["mask"].sum()) for s in steps for bucket in s.batches[0]
        ]
        trained[f"{name}, useful"] = np.mean([s.metrics["useful_tokens"] for s in steps])
    assert sum(trained["packed"]) == sum(trained["apart"])
    assert trained["packed, useful"] > trained["apart, useful"]


def test_responses_share_rows_if_the_options_and_the_model_allow_it(config, model):
    config.rlvr.packing = True
    options = parse_run(config).sections
    for made, shares in ((model, True), (model._replace(packs=False), False)):
        parts = placeholders.parts(made, row_shards=2)
        assert parts.packing(options["rlvr"]) == (Packing(2) if shares else None)
        assert parts.packing(options["sft"]) is None
        for name, algorithm in (("rlvr", rlvr.ALGORITHM), ("sft", sft.ALGORITHM)):
            rows = algorithm.make(options[name], parts).empty_batch[0]["rows"]
            assert ("starts" in rows) == (shares and name == "rlvr")
