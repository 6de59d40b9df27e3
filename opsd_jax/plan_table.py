"""A plan as a table of text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

GIB = 2**30


def lines(plan: dict[str, Any]) -> Iterator[str]:
    """The lines of what `opsd_jax.plan.plan` returned, of up to 96 columns."""
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
    yield (
        f"  in the decode loop at most {largest['decode_steps']:,} elements, in the loss's "
        f"{largest['loss_chunks']:,}; the smallest weight has {plan['smallest_weight']:,}"
    )
    yield ""
    if plan["fits"]:
        yield "It fits."
    for phase in plan["phases"]:
        if phase["total"] > plan["hbm"]:
            yield from _advice(plan, phase)


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
        yield f"  {phase['name']:<22}{phase['total'] / GIB:8.2f}   {verdict}"
        parts = ((name, size) for name, size in phase["parts"].items() if size > 0.005 * GIB)
        made = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts)
        yield from textwrap.wrap(made, 92, initial_indent="    ", subsequent_indent="    ")
    yield ""
    yield f"{'of a device:':<38}compile    HBM  temporaries   TFLOP   moved  network"
    yield f"{'':<44}s    GiB          GiB             GiB      GiB"
    for p in plan["programs"]:
        network = sum(c["bytes"] for c in p["collectives"])
        yield (
            f"  {p['name']:<36}{p['compile_seconds']:7.0f}"
            f"{(p['arguments'] + p['temporaries']) / GIB:7.2f}{p['temporaries'] / GIB:13.2f}"
            f"{p['flops'] / 1e12:8.4g}{p['hbm_bytes'] / GIB:8.4g}{network / GIB:9.3g}"
        )
    yield ""
    yield "roofline, s: at best; with products, memory and network one after the other"
    for name, times in plan["times"].items():
        best, in_turn = times["seconds_at_best"], times["seconds_in_turn"]
        yield f"  {name:<22}{best:9.1f}{in_turn:9.1f}"
    share = f"{plan['response_length']:.0%}"
    yield f"  for responses of {share} of their budget, full prompts, all rows active; bfloat16,"
    yield "  HBM and one ring of the network at the makers' speed"


def _advice(plan: dict[str, Any], phase: dict[str, Any]) -> Iterator[str]:
    """The largest tensors of a phase that does not fit, and what would make them smaller."""
    name, parts = phase["name"], phase["parts"]
    yield f"{name} does not fit. The largest in it:"
    for part, size in sorted(parts.items(), key=lambda item: -item[1])[:3]:
        yield f"  {size / GIB:7.2f} GiB  {part}"
    stage = name.split()[0]
    prefix = f"{stage}: train step" if name.endswith(" step") else f"{name}: "
    mine = [p for p in plan["programs"] if p["name"].startswith(prefix)]
    for tensor in max(mine, key=lambda p: p["temporaries"])["largest"]:
        made_by = tensor["made_by"].rpartition("/while/body/")[2][-50:]
        many = f"{tensor['count']} x {tensor['shape']}"
        yield f"    {tensor['bytes'] / GIB:7.2f} GiB  {many:<34} {made_by}"
    training = {
        "temporaries": f"{stage}.microbatch smaller; model.remat 'full'; mesh with more `tensor`, "
        "and model.sequence_parallel",
    }
    sampling = {
        "cache": f"{stage}.slots or response_tokens smaller; more devices",
        "weights for sampling": "decode_mesh with more `tensor`",
        "temporaries": f"{stage}.slots smaller: a prefill takes a quarter of them",
    }
    known = training if name.endswith(" step") else sampling
    state = "mesh with more devices over `fsdp`; optimizer.moment_dtype 'bfloat16'; more devices"
    yield f"  to change: {known.get(max(parts, key=parts.__getitem__), state)}"
