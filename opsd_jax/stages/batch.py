"""From ragged rows to batches of a few fixed shapes, and the scoring of responses in them.

A batch is a tuple of buckets, one a padded length: `{"count": n, "rows": arrays [M, m, ...]}`. Of
its M microbatches of m rows the first n are live, and the train step runs those alone: rows that a
gate dropped cost nothing, and no number of rows means another program.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from opsd_jax.losses import Head
from opsd_jax.policy import Params, Policy
from opsd_jax.rollout.engine import left_pad

Batch = tuple[dict[str, Any], ...]
Microbatch = dict[str, Any]
Inserts = Sequence[tuple[int, Sequence[int]]]  # (index in the response, ids to stand before it)


def pack(
    rows: Sequence[Any],
    lengths: Sequence[int],
    *,
    buckets: Sequence[int],
    microbatch: int,
    capacity: int,
    collate: Callable[[list[Any], int], Microbatch],
) -> Batch:
    """Rows into the buckets of their lengths, as microbatches.

    Args:
      rows: what `collate` understands, at most `capacity`.
      lengths: of each row, what the bucket has to hold.
      buckets: padded lengths, ascending; a row goes into the first that holds it.
      microbatch: rows m of a microbatch. The last of a bucket is filled up with empty rows.
      capacity: the most rows that a batch can have. It fixes M = ceil(capacity / m).
      collate: `(up to m rows, padded length) -> dict of arrays [m, ...]`, nested or not; rows that
        are not there are to weigh nothing.

    Raises:
      ValueError: a row fits no bucket, or there are more rows than `capacity`.
    """
    if len(rows) > capacity:
        raise ValueError(f"{len(rows)} rows for a batch of capacity {capacity}.")
    if len(rows) and max(lengths) > buckets[-1]:
        raise ValueError(f"a row of {max(lengths)} tokens; the longest bucket holds {buckets[-1]}.")
    of_bucket = np.searchsorted(buckets, lengths)
    batch = []
    for b, padded in enumerate(buckets):
        members = [row for row, i in zip(rows, of_bucket, strict=True) if i == b]
        parts = [members[i : i + microbatch] for i in range(0, len(members), microbatch)]
        empty: list[list[Any]] = [[]] * (-(-capacity // microbatch) - len(parts))
        collated = [collate(part, padded) for part in parts + empty]
        stacked = jax.tree.map(lambda *arrays: np.stack(arrays), *collated)
        batch.append({"count": np.int32(len(parts)), "rows": stacked})
    return tuple(batch)


def right_pad(rows: Sequence[Sequence[Any]], shape: tuple[int, int], fill: Any) -> np.ndarray:
    """Ragged rows as one array of `shape`, with the dtype of `fill`, which stands in the rest."""
    out = np.full(shape, fill)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def prompt_and_response(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    rows: int,
    prompt_tokens: int,
    response_tokens: int,
    pad_id: int,
    inserts: Sequence[Inserts] | None = None,
    insert_tokens: int = 0,
) -> dict[str, np.ndarray]:
    """Sequences with each response at the same columns, whatever the length of its prompt.

    Prompts are padded on the left to `prompt_tokens` = P, responses on the right to
    `response_tokens` = R, so the response's columns are [P, P + R) of every row, for the student's
    prompts and for the teacher's, and the logits that predict them are those of [P - 1, P + R - 1).

    `inserts` puts other tokens into the responses, up to I = `insert_tokens` in each; then the
    columns that predict the response's own tokens differ from row to row, and come out too.

    Returns:
      int32 `tokens` and `positions` [rows, P + R + I]; with I > 0 also `predictors` [rows, R]. Rows
      beyond the given ones are all padding.
    """
    tokens = np.full((rows, prompt_tokens + response_tokens + insert_tokens), pad_id, np.int32)
    positions = np.full_like(tokens, -1)
    n, P = len(prompts), prompt_tokens
    tokens[:n, :P], positions[:n, :P] = left_pad(prompts, P, pad_id)
    predictors = np.tile(np.arange(P - 1, P - 1 + response_tokens, dtype=np.int32), (rows, 1))
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        whole = np.asarray(response, np.int32)
        if inserts is not None:
            places = [at for at, ids in inserts[i] for _ in ids]
            before = np.searchsorted(places, np.arange(len(whole)), side="right")
            predictors[i, : len(whole)] += before.astype(np.int32)
            whole = np.insert(whole, places, [token for _, ids in inserts[i] for token in ids])
        end = P + len(whole)
        tokens[i, P:end] = whole
        positions[i, P:end] = np.arange(len(prompt), len(prompt) + len(whole))
    arrays = {"tokens": tokens, "positions": positions}
    return arrays | {"predictors": predictors} if insert_tokens else arrays


def collate_responses(
    rows: Sequence[dict[str, Any]],
    padded: int,
    *,
    microbatch: int,
    prompt_tokens: dict[str, int],
    per_token: Sequence[str] = (),
    per_row: Sequence[str] = (),
    pad_id: int,
    insert_tokens: Mapping[str, Callable[[int], int]] | None = None,
) -> Microbatch:
    """The arrays of up to m = `microbatch` rows, with responses padded to R = `padded`.

    Args:
      rows: each a dict with the ids of its `response` and what the other arguments name.
      prompt_tokens: for each of a row's prompts, its padded length.
      per_token: names of values with a number a response token.
      per_row: names of values with one number.
      insert_tokens: for prompts "x" whose responses have `Inserts`, in a row's "x/inserts": padded
        length of the response -> how many tokens these are at most.

    Returns:
      For each prompt, `prompt_and_response` under its name; `response` int32 [m, R]; `mask` bool
      [m, R], its tokens; the other values as float32 [m, R] and [m], 0 where there is nothing.
    """
    responses = [row["response"] for row in rows]
    shape = (microbatch, padded)
    inserted = insert_tokens or {}
    arrays: Microbatch = {
        name: prompt_and_response(
            [row[name] for row in rows],
            responses,
            rows=microbatch,
            prompt_tokens=width,
            response_tokens=padded,
            pad_id=pad_id,
            inserts=[row[f"{name}/inserts"] for row in rows] if name in inserted else None,
            insert_tokens=inserted[name](padded) if name in inserted else 0,
        )
        for name, width in prompt_tokens.items()
    }
    return arrays | {
        "response": right_pad(responses, shape, np.int32(pad_id)),
        "mask": right_pad([[True] * len(r) for r in responses], shape, False),
        **{k: right_pad([row[k] for row in rows], shape, np.float32(0)) for k in per_token},
        **{
            k: right_pad([[row[k]] for row in rows], (microbatch, 1), np.float32(0))[:, 0]
            for k in per_row
        },
    }


def pack_responses(
    rows: Sequence[dict[str, Any]],
    config: ConfigDict,
    *,
    capacity: int,
    prompt_tokens: dict[str, int],
    per_token: Sequence[str] = (),
    per_row: Sequence[str] = (),
    pad_id: int,
    insert_tokens: Mapping[str, Callable[[int], int]] | None = None,
) -> Batch:
    """`pack` by response length, with `collate_responses`; `config` is a stage's, for its `buckets`
    and `microbatch`.
    """
    return pack(
        rows,
        [len(row["response"]) for row in rows],
        buckets=config.buckets,
        microbatch=config.microbatch,
        capacity=capacity,
        collate=functools.partial(
            collate_responses,
            microbatch=config.microbatch,
            prompt_tokens=prompt_tokens,
            per_token=per_token,
            per_row=per_row,
            pad_id=pad_id,
            insert_tokens=insert_tokens,
        ),
    )


def response_head(
    policy: Policy, params: Params, sequences: dict[str, jax.Array], response_tokens: int
) -> Head:
    """The logits [m, R, V] that predict each response token of `prompt_and_response` sequences."""
    hidden_mxTxD, _ = policy.forward(params, sequences["tokens"], sequences["positions"])
    if "predictors" in sequences:
        columns_mxRx1 = sequences["predictors"][..., None]
        return Head(
            policy.unembed, params, jnp.take_along_axis(hidden_mxTxD, columns_mxRx1, axis=1)
        )
    return Head(policy.unembed, params, hidden_mxTxD[:, -response_tokens - 1 : -1])
