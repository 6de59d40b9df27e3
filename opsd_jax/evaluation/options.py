"""Options of an evaluation: which problems to evaluate and how to sample responses."""

from __future__ import annotations

import dataclasses

from opsd_jax.options import option


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Options that select held-out problems for an evaluation and set how to sample responses."""

    problems: int = option(
        0,
        "Number of held-out problems to evaluate.",
        expects="0 for all problems, or at least 2, which a standard error needs",
        check=lambda problems: problems == 0 or problems >= 2,
    )
    samples: int = option(8, "Number of responses to each problem.", at_least=1)
    temperature: float = option(0.6, "Sampling temperature; 0 is greedy.", at_least=0)
    top_k: int = option(
        20, "Number of most likely tokens to sample from; 0 for the whole vocabulary.", at_least=0
    )
    top_p: float = option(
        0.95,
        "Sample from the fewest most likely tokens whose probabilities sum to this; 1 for all.",
        above=0,
        at_most=1,
    )
    min_p: float = option(
        0.0,
        "Sample from tokens with at least this fraction of the most likely token's probability.",
        at_least=0,
        at_most=1,
    )
    slots: int = option(
        128, "Number of decoding slots on all devices: responses sampled at once.", at_least=1
    )
    prompt_tokens: int = option(1024, "Longest prompt, in tokens.", at_least=1)
    response_tokens: int = option(
        8192, "Longest response, in tokens; one that reaches it is truncated.", at_least=1
    )
    divergence_responses: int = option(
        1024,
        "Measure the divergence from a privileged teacher on about this many of the responses, "
        "before and after its stage; 0 for none.",
        at_least=0,
        added=True,
    )
    seed: int = option(0, "Seed of the random numbers for sampling.", at_least=0, below=2**31)
