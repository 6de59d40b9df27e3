"""How SFT makes batches of demonstrations."""

import numpy as np
import pytest

from opsd_jax.config.run_options import parse_run
from opsd_jax.stages import sft


@pytest.mark.parametrize("microbatch", [4, 8, 16])
def test_a_step_has_short_and_long_demonstrations(config, task, model, microbatch):
    """Only the rows of a microbatch are of similar length. The steps have every row once."""
    config.sft.update({"batch_size": 16, "microbatch": microbatch, "steps": sft.WINDOW})
    config.sft.buckets = tuple(range(40, 136, 8))
    options = parse_run(config).sections["sft"]
    stage = sft.stage(options, task, model.policy, 0)
    steps = [stage.batches(step, None) for step in range(sft.WINDOW)]
    demonstrations = task.demonstrations(0)
    rows = [demonstrations[i] for i in range(16 * sft.WINDOW)]
    lengths = [len(row.response) for row in rows]
    means = [step.metrics["length"] for step in steps]
    assert np.mean(means) == pytest.approx(np.mean(lengths))
    assert sum(step.metrics["tokens"] for step in steps) == sum(
        len(row.prompt) + len(row.response) for row in rows
    )
    # The variance of a mean of n independent groups is that of one divided by n.
    spread = np.std(means) / np.std(lengths)
    expected = (microbatch / 16) ** 0.5
    assert 0.7 * expected < spread < 1.3 * expected
    # Sorted rows need few tokens of padding: 4 on average for buckets 8 apart, and a few more.
    assert np.mean([step.metrics["useful_tokens"] for step in steps]) > 0.85
