"""Options of every stage (`StageOptions`) and of every stage with rollouts (`RolloutOptions`)."""

from __future__ import annotations

import dataclasses

from opsd_jax.options import fail, option
from opsd_jax.rollout.speculation import MOST_GUESSES
from opsd_jax.training.optimizer import OptimizerOptions

EARLIER_STAGE = "'' or a stage before this one"
LENGTHS = "lengths above 0 in ascending order"


def ascending(lengths: tuple[int, ...]) -> bool:
    """Returns whether `lengths` has at least one value, all positive and strictly ascending."""
    return bool(lengths) and lengths[0] > 0 and list(lengths) == sorted(set(lengths))


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageOptions:
    """The options that every stage has.

    The run, the training loop and the plan read them. The options class of an algorithm extends
    this one. A stage's section of the config has one field for each option.
    """

    algorithm: str = option(
        "",
        "Algorithm of the stage.",
        expects="a key of ALGORITHMS (opsd_jax/stages), or 'package.module:ALGORITHM'",
    )
    init_from: str = option(
        "",
        "Stage whose result this one starts from; '' for the run's initial parameters.",
        expects=EARLIER_STAGE,
    )
    steps: int = option(100, "Training steps.", at_least=1)
    microbatch: int = option(16, "Rows that the train step computes at once.", at_least=1)
    buckets: tuple[int, ...] = option(
        (1536, 3072, 5120, 9216),
        "Padded lengths of prompt plus response, in tokens, ascending; all are in one program.",
        expects=LENGTHS,
        check=ascending,
    )
    packing: bool = option(
        False,
        "Whether several responses share a row, up to its padded length, where the model supports "
        "it. The same responses have the same loss; SFT also reads its demonstrations in another "
        "order. `buckets` may then be one or two lengths.",
        added=True,
    )
    loss_chunk: int = option(
        0,
        "Tokens per device whose logits exist at the same time; 0 chooses by memory.",
        at_least=0,
    )
    checkpoint_every: int = option(20, "Steps between checkpoints.", at_least=1)
    optimizer: OptimizerOptions = option(OptimizerOptions(), "AdamW with a schedule.")

    def optimizer_updates(self) -> int:
        """Returns the number of optimizer updates in the whole stage."""
        return self.steps

    def check(self, field: str) -> None:
        """Raises ConfigError if two options contradict each other. `field` names their section."""
        updates = self.optimizer_updates()
        if self.optimizer.warmup >= updates:
            expected = f"less than {updates}, the number of optimizer updates in the stage"
            fail(f"{field}.optimizer.warmup", self.optimizer.warmup, expected)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutOptions(StageOptions):
    """The options of a stage that samples and verifies rollouts in each step."""

    prompts: int = option(32, "Problems per step.", at_least=1)
    group_size: int = option(8, "Rollouts per problem.", at_least=1)
    slots: int = option(
        128, "Decoding slots: rollouts sampled at the same time, over all devices.", at_least=1
    )
    pool_tokens: int = option(
        0,
        "Tokens that a paged cache holds while rollouts are sampled, over all devices; rollouts "
        "take its pages as they grow. 0 for `slots` times prompt_tokens + response_tokens. Needs a "
        "paged cache, so a TPU.",
        at_least=0,
        added=True,
    )
    resample_rounds: int = option(
        0,
        "Further rounds of other problems when a step has too few rollouts to train on (DAPO's "
        "dynamic sampling).",
        at_least=0,
    )
    carry_over: int = option(
        0,
        "Problems that are sampled in addition to `prompts`, at most as many. A step ends when the "
        "rollouts of `prompts` problems have ended, and the others continue in the next step. 0: "
        "every step waits for all of its rollouts.",
        at_least=0,
        added=True,
    )
    max_staleness: int = option(
        4,
        "With carry_over: a step does not end before the rollouts that began this many steps ago.",
        at_least=1,
        added=True,
    )
    temperature: float = option(
        1.0, "Sampling temperature; not 0, because a stage trains on random samples.", above=0
    )
    prompt_tokens: int = option(1024, "Longest prompt, in tokens.", at_least=1)
    response_tokens: int = option(
        8192, "Token budget of a response; a response that fills it is truncated.", at_least=1
    )

    speculation: int = option(
        0,
        "Tokens that are guessed from a rollout's earlier text and verified in one forward pass, "
        "while few slots are active; 0 turns it off. Needs a dense cache. The rollouts stay the "
        "same, up to rounding.",
        at_least=0,
        at_most=MOST_GUESSES,
        added=True,
    )

    @property
    def rollouts(self) -> int:
        """The number of rollouts per step, not counting resampled ones."""
        return self.prompts * self.group_size

    @property
    def in_flight(self) -> int:
        """The number of problems whose rollouts are sampled at the same time."""
        return self.prompts + self.carry_over

    def check(self, field: str) -> None:
        super().check(field)
        longest = self.prompt_tokens + self.response_tokens - 1
        if self.buckets[-1] < longest:
            expected = f"a last length of at least {longest} = prompt_tokens + response_tokens - 1"
            fail(f"{field}.buckets", self.buckets, expected)
        if self.carry_over > self.prompts:
            expected = (
                f"at most {field}.prompts = {self.prompts}, so that a step can train all rollouts "
                "that are due"
            )
            fail(f"{field}.carry_over", self.carry_over, expected)
        if self.carry_over and self.resample_rounds:
            expected = f"0 together with {field}.resample_rounds = {self.resample_rounds}"
            fail(f"{field}.carry_over", self.carry_over, expected)
