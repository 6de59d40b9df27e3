"""Formats a plan as lines of text, with tables of memory, programs and times."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from opsd_jax.losses.fused import LOSS_CHUNKS
from opsd_jax.parallel.program import DECODE_STEPS
from opsd_jax.planning.chips import GIB
from opsd_jax.planning.keys import Part, PhaseKey, PhaseKind
from opsd_jax.planning.phases import Phase
from opsd_jax.planning.plan import Plan
from opsd_jax.stages.parts import Sampling

_LOOPS = {DECODE_STEPS: "the decode loop", LOSS_CHUNKS: "the loss loop"}
MOMENTS = ("moment", "second_moment")
_LARGER_TENSOR = "a decode_mesh with a larger `tensor`"


def lines(plan: Plan) -> Iterator[str]:
    """Yields the lines that `opsd-jax plan` prints.

    Args:
      plan: the plan that `opsd_jax.planning.plan.plan` returns.
    """
    yield from summary(plan)
    yield ""
    yield "collectives: the largest of each program, and the loops around them"
    for program in plan.programs:
        for c in program.collectives[:3]:
            if c["bytes"] > 2**20:
                where = " > ".join(c["loops"]) or "no loop"
                size = f"{c['times']} x, up to {c['largest'] / 2**20:.1f} MiB"
                yield f"  {program.name:<38}{c['op']:<19}{size:<27}{where}"
    largest = plan.largest_collective
    elements = [f"at most {n:,} in {_LOOPS[loop]}" for loop, n in largest.items()]
    weight = f"the smallest weight has {plan.smallest_weight:,}"
    yield f"  elements: {', '.join([*elements, weight])}"
    yield ""
    if plan.fits:
        yield "It fits."
    for phase in plan.phases:
        if phase.total > plan.hbm:
            yield from _advice(plan, phase)
    for program in plan.programs:
        if program.refused:
            needed = (program.arguments + program.temporaries) / GIB
            yield f"The compiler refuses {program.name}: it needs {needed:.2f} GiB on its own."


def summary(plan: Plan) -> Iterator[str]:
    """Yields the lines of a plan that a plan file also contains: memory, programs and times."""
    mesh, decode = (" x ".join(map(str, m.values())) for m in (plan.mesh, plan.decode_mesh))
    slices = f"{plan.slices} x " if plan.slices > 1 else ""
    yield f"{slices}{plan.topology}: {plan.devices} x {plan.chip}"
    yield f"mesh (data x fsdp x tensor): {mesh}; while sampling: {decode}"
    yield ""
    yield from _memory(plan)
    yield ""
    yield from _programs(plan)
    yield ""
    yield from _times(plan)


def _memory(plan: Plan) -> Iterator[str]:
    """Yields lines with the memory of each phase: total, free memory, and parts."""
    yield f"HBM of a device, in GiB, out of {plan.hbm / GIB:.2f}"
    for phase in plan.phases:
        left = (plan.hbm - phase.total) / GIB
        verdict = f"{left:.2f} left" if left >= 0 else f"DOES NOT FIT, by {-left:.2f}"
        yield f"  {phase.name:<25}{phase.total / GIB:7.2f}   {verdict}"
        parts = ((name, size) for name, size in phase.parts.items() if size > 0.005 * GIB)
        text = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts)
        yield from textwrap.wrap(text, 92, initial_indent="    ", subsequent_indent="    ")
        if phase.slots_that_fit is not None and phase.sampling is not None:
            yield (
                f"    the cache holds {phase.cache_tokens:,} tokens: {phase.slots_that_fit} slots "
                f"fit, {phase.sampling.slots} are set"
            )


def _programs(plan: Plan) -> Iterator[str]:
    """Yields lines with the compile time of each program and the costs of one execution."""
    columns = "compile     HBM  temporaries    TFLOP    moved  network"
    yield f"{'one execution on one device:':<40}{columns}"
    yield f"{'':<46}s     GiB          GiB               GiB      GiB"
    for program in plan.programs:
        network = sum(c["bytes"] for c in program.collectives)
        yield (
            f"  {program.name:<38}{program.compile_seconds:7.0f}"
            f"{(program.arguments + program.temporaries) / GIB:8.2f}"
            f"{program.temporaries / GIB:13.2f}{_short(program.flops / 1e12)}"
            f"{_short(program.hbm_bytes / GIB)}{_short(network / GIB)}"
        )


def _times(plan: Plan) -> Iterator[str]:
    """Yields lines with the roofline times of the phases and the run, and with the assumptions."""
    yield "roofline, in s: at best; with compute, memory and network one after the other; how often"
    for phase in plan.phases:
        best, in_turn = phase.seconds_at_best, phase.seconds_in_turn
        useful = phase.useful_tokens
        padding = "" if useful is None else f"   {useful:.0%} of its tokens are not padding"
        yield f"  {phase.name:<25}{best:9.1f}{in_turn:9.1f}{phase.times:7} x{padding}"
    hours = [seconds / 3600 for seconds in (plan.seconds_at_best, plan.seconds_in_turn)]
    low, high = (_short(hour).strip() for hour in hours)
    least, most = (_short(hour * plan.devices).strip() for hour in hours)
    yield f"  total: {low} to {high} hours, or {least} to {most} device-hours"
    length = f"{plan.response_length:.0%}"
    yield f"  Assumptions: the mean response has {length} of its budget (exponential distribution);"
    yield "  prompts are full and all rows are active; bfloat16 compute, HBM and one ring of the"
    yield "  network run at peak; verification, checkpoints and compilation take no time; no"
    yield "  rollout waits for pages of the cache."
    if plan.slices > 1:
        yield "  Collectives between slices take longer than this, because their network is slower."


def _short(number: float) -> str:
    """Formats a number with about three significant digits, right-aligned in nine columns."""
    return f"{number:9.0f}" if number >= 100 else f"{number:9.3g}"


def _advice(plan: Plan, phase: Phase) -> Iterator[str]:
    """Yields advice on a phase that does not fit in memory: what is largest, and what to change."""
    name, parts = phase.name, phase.parts
    yield f"{name} does not fit. Its largest parts:"
    for part, size in sorted(parts.items(), key=lambda item: -item[1])[:3]:
        yield f"  {size / GIB:7.2f} GiB  {part}"
    programs = [p for p in plan.programs if p.name in phase.programs]
    for tensor in max(programs, key=lambda p: p.temporaries).largest:
        made_by = tensor["made_by"].rpartition("/while/body/")[2][-50:]
        tensors = f"{tensor['count']} x {tensor['shape']}"
        yield f"    {tensor['bytes'] / GIB:7.2f} GiB  {tensors:<34} {made_by}"
    largest = max(parts, key=parts.__getitem__)
    changes = "; ".join(_changes(plan, phase, largest))
    yield from textwrap.wrap(
        f"To reduce it: {changes}", 96, initial_indent="  ", subsequent_indent="  "
    )


def _changes(plan: Plan, phase: Phase, largest: Part) -> list[str]:
    """Returns config changes that would reduce the largest part of a phase's memory."""
    stage, kind, _ = phase.key
    more_devices = ["a mesh with more devices along `fsdp`", "more devices"]
    match largest:
        case Part.SAMPLING_WEIGHTS:
            return [_LARGER_TENSOR, "more devices"]
        case Part.CACHE | Part.PROMPT_CACHE | Part.TEMPORARIES if phase.sampling is not None:
            return _sampling_changes(plan, stage, phase.sampling, largest)
        case Part.BATCH if phase.row_fields is not None:
            factors, divisor = phase.row_fields
            smaller = " or ".join(f"{stage}.{field}" for field in factors)
            larger = f", or a larger {stage}.{divisor}" * bool(divisor)
            return [f"a smaller {smaller}{larger}", "fewer buckets"]
        case Part.BATCH:
            return [f"a smaller evaluation.response_tokens or {stage}.microbatch"]
        case Part.OPTIMIZER:
            moments = (f"{stage}.optimizer.{moment}_dtype" for moment in MOMENTS)
            wide = [field for field in moments if plan.config[field] != "bfloat16"]
            return [*(f"{field} = 'bfloat16'" for field in wide), *more_devices]
        case Part.TEMPORARIES if kind is PhaseKind.RESHARD:
            return [_LARGER_TENSOR, "more devices"]
        case Part.TEMPORARIES:
            return _activation_changes(plan, phase.key)
    return more_devices


def _sampling_changes(plan: Plan, section: str, sampling: Sampling, largest: Part) -> list[str]:
    """Returns config changes that would reduce the caches or temporaries of a sampling phase."""
    slots = f"{section}.{sampling.slots_field}"
    if largest is Part.CACHE and sampling.pool_tokens:
        return [f"a smaller {section}.pool_tokens", "more devices"]
    if largest is Part.CACHE:
        return [f"a smaller {slots} or {section}.{sampling.response_tokens_field}", "more devices"]
    shards = plan.decode_mesh["data"] * plan.decode_mesh["fsdp"]
    prompts = sampling.slots // (4 * sampling.group_size)
    fewer = f"a smaller {slots}: a prefill fills a quarter of the slots"
    return [*[fewer] * (prompts > shards), "shorter prompts", _LARGER_TENSOR]


def _activation_changes(plan: Plan, key: PhaseKey) -> list[str]:
    """Returns config changes that would reduce the temporaries of a train step or a probe."""
    config, mesh = plan.config, plan.mesh
    microbatch = f"{key.section}.microbatch"
    can_split_tokens = mesh["tensor"] > 1 and config.get("model.context_parallel") is False
    can_shrink = config[microbatch] > mesh["data"] * mesh["fsdp"]
    return [
        *["a smaller evaluation.response_tokens"] * (key.kind == PhaseKind.PROBE),
        *[f"a smaller {microbatch}"] * can_shrink,
        *["model.remat = 'full'"] * (config.get("model.remat") != "full"),
        *["model.sequence_parallel = True"] * (config.get("model.sequence_parallel") is False),
        "a mesh with a larger `tensor`",
        *["model.context_parallel = True"] * can_split_tokens,
    ]
