"""Programs and loops of a plan are matched by key; a key without a match is an error."""

import pytest

from opsd_jax.parallel.chips import CHIPS
from opsd_jax.parallel.program import DECODE_STEPS, ProgramKey, ProgramKind
from opsd_jax.planning import programs
from opsd_jax.planning.chips import PlanError
from opsd_jax.planning.keys import PhaseKey, PhaseKind

LOOP = """HloModule jit_decode

%body (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %copy.1 = f32[4]{0} copy(%p)
}

%cond (p: f32[4]) -> pred[] {
  %p = f32[4]{0} parameter(0)
  ROOT %more = pred[] custom-call(%p), custom_call_target="more"
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %loop = f32[4]{0} while(%p), condition=%cond, body=%body, OP_NAME
}
"""


def decode(scope, trip_counts):
    """The costs of a decoding program whose only loop has the given named scope."""
    text = LOOP.replace("OP_NAME", f'metadata={{op_name="jit(decode)/{scope}/while"}}')
    key = ProgramKey(ProgramKind.DECODE, 1024)
    built = programs.CompiledProgram(key, f"rollouts: {key}", text, 1.0, 8, 16, 8)
    return programs.program_costs(built, CHIPS["TPU v5"], trip_counts)


def test_a_loop_is_counted_with_the_trip_count_of_its_name():
    assert decode(DECODE_STEPS, {(DECODE_STEPS,): 64}).hbm_bytes == 64 * 32


def test_a_loop_without_a_trip_count_is_an_error():
    with pytest.raises(PlanError, match=r"rollouts: decode in 1024 .* trip counts: decoding; exp"):
        decode("decoding", {(DECODE_STEPS,): 64})


def test_a_trip_count_without_a_loop_is_an_error():
    costs = decode(DECODE_STEPS, {(DECODE_STEPS,): 64})
    programs.check_loops_exist([costs], {(DECODE_STEPS,): 64})
    with pytest.raises(PlanError, match="decode in 1024: bucket_0 > loss_chunks; expected"):
        programs.check_loops_exist([costs], {("bucket_0", "loss_chunks"): 3})


def test_executions_are_matched_by_key():
    costs, key = decode(DECODE_STEPS, {(DECODE_STEPS,): 64}), ProgramKey(ProgramKind.DECODE, 1024)
    unused = ProgramKey(ProgramKind.RESIZE)
    assert programs.matched_executions([costs], {key: 2.5, unused: 0}) == [(2.5, costs)]


@pytest.mark.parametrize(
    "executions",
    [
        {ProgramKey(ProgramKind.DECODE, 512): 1},
        {ProgramKey(ProgramKind.DECODE, 1024): 1, ProgramKey(ProgramKind.START): 1},
    ],
    ids=["unknown program", "missing program"],
)
def test_a_program_or_execution_without_a_match_is_an_error(executions):
    costs = decode(DECODE_STEPS, {(DECODE_STEPS,): 64})
    with pytest.raises(PlanError, match=r"compiled the programs decode in 1024; expected"):
        programs.matched_executions([costs], executions)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        (PhaseKey("opsd", PhaseKind.RESHARD), "opsd reshard"),
        (PhaseKey("opsd", PhaseKind.SAMPLING, "memos, closed"), "opsd memos, closed"),
        (PhaseKey("opsd", PhaseKind.PROBE_SAMPLING, "memos, closed"), "opsd probe memos, closed"),
        (PhaseKey("opsd", PhaseKind.PROBE), "opsd probe"),
        (PhaseKey("mine", PhaseKind.SAMPLING, "drafts of {3}"), "mine drafts of {3}"),
        (PhaseKey("evaluation", PhaseKind.EVALUATION), "evaluation"),
    ],
)
def test_a_phase_is_printed_with_its_section_and_sampling(key, name):
    assert str(key) == name
