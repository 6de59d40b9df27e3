"""A plan as a table of text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

GIB = 2**30


def lines(plan: dict[str, Any]) -> Iterator[str]:
    """The lines of what `opsd_jax.planning.plan.plan` returned, of up to 100 columns."""
    yield from header(plan)
    yield ""
    yield "collectives: the largest of each program, and the loops that they stand in"
    for p in plan["programs"]:
        for c in p["collectives"][:3]:
            if c["bytes"] > 2**20:
                where = " > ".join(c["loops"]) or "no loop"
                size = f"{c['times']} x, up to {c['largest'] / 2**20:.1f} MiB"
                yield f"  {p['name']:<36}{c['op']:<19}{size:<27}{where}"
    largest = plan["largest_collective"]
    loops = {"decode_steps": "the decode loop", "loss_chunks": "the loss's"}
    elements = [f"at most {n:,} in {loops[loop]}" for loop, n in largest.items()]
    yield f"  elements: {', '.join(elements)}; in the smallest weight {plan['smallest_weight']:,}"
    yield ""
    if plan["fits"]:
        yield "It fits."
    for phase in plan["phases"]:
        if phase["total"] > plan["hbm"]:
            yield from _advice(plan, phase)
    for p in plan["programs"]:
        if p["refused"]:
            needed = (p["arguments"] + p["temporaries"]) / GIB
            yield f"The compiler refuses {p['name']}: by itself it needs {needed:.2f} GiB."


def header(plan: dict[str, Any]) -> Iterator[str]:
    """What a config's header quotes: memory, programs and times."""
    mesh, decode = (" x ".join(map(str, plan[name].values())) for name in ("mesh", "decode_mesh"))
    slices = f"{plan['slices']} x " if plan["slices"] > 1 else ""
    yield f"{slices}{plan['topology']}: {plan['devices']} x {plan['chip']}"
    yield f"mesh (data x fsdp x tensor): {mesh}; while sampling: {decode}"
    yield ""
    yield f"HBM of a device, GiB, of {plan['hbm'] / GIB:.2f}"
    for phase in plan["phases"]:
        left = (plan["hbm"] - phase["total"]) / GIB
        verdict = f"{left:.2f} left" if left >= 0 else f"DOES NOT FIT, by {-left:.2f}"
        yield f"  {phase['name']:<25}{phase['total'] / GIB:7.2f}   {verdict}"
        parts = ((name, size) for name, size in phase["parts"].items() if size > 0.005 * GIB)
        made = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts)
        yield from textwrap.wrap(made, 92, initial_indent="    ", subsequent_indent="    ")
    yield ""
    yield f"{'of a device:':<38}compile     HBM  temporaries    TFLOP    moved  network"
    yield f"{'':<44}s     GiB          GiB               GiB      GiB"
    for p in plan["programs"]:
        network = sum(c["bytes"] for c in p["collectives"])
        yield (
            f"  {p['name']:<36}{p['compile_seconds']:7.0f}"
            f"{(p['arguments'] + p['temporaries']) / GIB:8.2f}{p['temporaries'] / GIB:13.2f}"
            f"{_short(p['flops'] / 1e12)}{_short(p['hbm_bytes'] / GIB)}{_short(network / GIB)}"
        )
    yield ""
    yield "roofline, s: at best; with products, memory and network one after the other; how often"
    for phase in plan["phases"]:
        best, in_turn = phase["seconds_at_best"], phase["seconds_in_turn"]
        useful = phase.get("useful_tokens")
        padding = "" if useful is None else f"   {useful:.0%} of its tokens are no padding"
        yield f"  {phase['name']:<25}{best:9.1f}{in_turn:9.1f}{phase['times']:7} x{padding}"
    hours = [plan[bound] / 3600 for bound in ("seconds_at_best", "seconds_in_turn")]
    low, high = (_short(hour).strip() for hour in hours)
    least, most = (_short(hour * plan["devices"]).strip() for hour in hours)
    yield f"  in all {low} to {high} hours; times {plan['devices']} devices {least} to {most}"
    share = f"{plan['response_length']:.0%}"
    yield f"  Responses have {share} of their budget on average, spread exponentially; prompts are"
    yield "  full, all rows active; bfloat16, HBM and one ring of the network go at the makers'"
    yield "  speed; verdicts, saves and compiling take no time."
    if plan["slices"] > 1:
        yield "  Between slices too, where the network is slower: their collectives take longer."


def _short(number: float) -> str:
    """A number of three digits, in nine columns."""
    return f"{number:9.0f}" if number >= 100 else f"{number:9.3g}"


def _advice(plan: dict[str, Any], phase: dict[str, Any]) -> Iterator[str]:
    """The largest tensors of a phase that does not fit, and what would make them smaller."""
    name, parts = phase["name"], phase["parts"]
    yield f"{name} does not fit. The largest in it:"
    for part, size in sorted(parts.items(), key=lambda item: -item[1])[:3]:
        yield f"  {size / GIB:7.2f} GiB  {part}"
    mine = [p for p in plan["programs"] if p["name"] in phase["programs"]]
    for tensor in max(mine, key=lambda p: p["temporaries"])["largest"]:
        made_by = tensor["made_by"].rpartition("/while/body/")[2][-50:]
        many = f"{tensor['count']} x {tensor['shape']}"
        yield f"    {tensor['bytes'] / GIB:7.2f} GiB  {many:<34} {made_by}"
    largest = max(parts, key=parts.__getitem__)
    changes = "; ".join(_changes(plan, phase, largest))
    yield from textwrap.wrap(
        f"to change: {changes}", 96, initial_indent="  ", subsequent_indent="  "
    )


def _changes(plan: dict[str, Any], phase: dict[str, Any], largest: str) -> list[str]:
    """What would make the `largest` part of a phase smaller, of what the config does not do yet."""
    config, mesh = plan["config"], plan["mesh"]
    name = phase["name"].removesuffix(", closed")
    stage, *kind = name.split()
    closed = name != phase["name"]
    slots, budget, group = f"{stage}.slots", f"{stage}.response_tokens", f"{stage}.group_size"
    if "memos" in kind:
        slots = f"{stage}.memo.slots"
        budget = f"{stage}.memo.{'close_tokens' if closed else 'tokens'}"
        group = ""
    elif not kind:
        group = f"{stage}.samples"
    more = ["mesh with more devices over `fsdp`", "more devices"]
    if largest == "weights for sampling" or (largest == "temporaries" and kind[-1:] == ["reshard"]):
        return ["decode_mesh with more `tensor`", "more devices"]
    if largest == "cache":
        return [f"{slots} or {budget} smaller", "more devices"]
    if largest == "batch" and kind == ["probe"]:
        return [f"evaluation.response_tokens or {stage}.microbatch smaller"]
    if largest == "batch":
        updates = f", or more {stage}.updates" * (f"{stage}.updates" in config)
        return [f"{stage}.prompts or {group} smaller{updates}", "fewer buckets"]
    if largest == "optimizer" and config[f"{stage}.optimizer.moment_dtype"] != "bfloat16":
        return [f"{stage}.optimizer.moment_dtype 'bfloat16'", *more]
    if largest == "temporaries" and kind[-1:] in (["step"], ["probe"]):
        rows, one_row = config[f"{stage}.microbatch"], mesh["data"] * mesh["fsdp"]
        return [
            *["evaluation.response_tokens smaller"] * (kind == ["probe"]),
            *[f"{stage}.microbatch smaller"] * (rows > one_row),
            *["model.remat 'full'"] * (config.get("model.remat") != "full"),
            *["model.sequence_parallel"] * (config.get("model.sequence_parallel") is False),
            "mesh with more `tensor`",
        ]
    if largest in ("temporaries", "prompts' cache"):
        shards = plan["decode_mesh"]["data"] * plan["decode_mesh"]["fsdp"]
        prompts = config[slots] // (4 * config.get(group, 1))
        return [
            *[f"{slots} smaller: a prefill takes a quarter of them"] * (prompts > shards),
            "shorter prompts",
            "decode_mesh with more `tensor`",
        ]
    return more
