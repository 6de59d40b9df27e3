"""The answers that the verifiers accept, the answers that they reject, and unreadable ones."""

import functools
import json
import time

import pytest
from paths import SHARED

from opsd_jax.problem import Problem
from opsd_jax.verify import extract
from opsd_jax.verify.characters import plain_characters
from opsd_jax.verify.lists import listing
from opsd_jax.verify.maths import maths
from opsd_jax.verify.normalise import bare, delimited, normalise, plain_number
from opsd_jax.verify.pool import check_golds
from opsd_jax.verify.settle import settle, understood, without_units
from opsd_jax.verify.units import is_counted, quantity, unit_name
from opsd_jax.verify.value import evaluate
from opsd_jax.verify.verdict import Verdict, Verifier
from opsd_jax.verify.verifiers import (
    VerifierOptions,
    at_once,
    by_source,
    choice,
    combine,
    exact,
    from_options,
    function,
    letter_in,
    number_in,
    numeric,
)

MATCH, MISMATCH, NO_ANSWER = (
    Verdict(True, "match"),
    Verdict(False, "mismatch"),
    Verdict(False, "no answer"),
)


def problem(answer, **fields):
    return Problem(0, "", "", answer, **fields)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{4}.", "4"),
        (r"\boxed{\frac{1}{2}} then \boxed{ \frac{1}{3} }", r"\frac{1}{3}"),
        (r"\boxed{2}. wait, actually \boxed{3}", "3"),
        (r"\boxed{3} \boxed{4}", "3, 4"),
        (r"$\boxed{3}$ and $\boxed{4}$", "3, 4"),
        (r"\boxed{1}, \boxed{2}\text{ or }\boxed{3}", "1, 2, 3"),
        (r"\boxed{4}\quad\boxed{4}", "4"),
        (r"\boxed{\boxed{4}}", "4"),
        (r"\boxed{5} and then \boxed{\frac{1}{", "5"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\left\{x : x > 0\right\}}", r"\left\{x : x > 0\right\}"),
        (r"\boxed 5.", "5."),
        (r"\fbox{7}", "7"),
        (r"\boxed{}", None),
        (r"\boxed{5}. Write it as \boxed{}", "5"),
        (r"\boxed{5} \boxed{ \text{ } }", "5"),
        (r"\boxed{5} \boxed{\boxed{}}", "5"),
        (r"\boxed{", None),
        ("no box", None),
        (r"<think>\boxed{3}</think> It is \boxed{4}", "4"),
        (r"<think>\boxed{3}</think> It is 4", None),
        (r"<think> it may be \boxed{3}", None),
        (r"a </think> b </think> \boxed{4}", "4"),
        (r"\boxed{3}</think>", None),
    ],
)
def test_boxed_finds_the_last_balanced_box(text, answer):
    assert extract.extract(text) == answer


@pytest.mark.parametrize(
    ("conventions", "text", "answer"),
    [
        (("####",), "#### 3\nso\n#### 1,234\n", "1,234"),
        (("####",), "#### \n", None),
        (("####",), "##### 5\n#### 4", "4"),
        (("answer",), "Answer: 3\nAnswer: $x^2$", "$x^2$"),
        (("answer",), "**Answer:** 12 apples", "12 apples"),
        (("answer",), "the answer is: 12", "12"),
        (("answer",), "Final Answer: The final answer is 12. I hope it is correct.", "12"),
        (("answer",), "the answerer: 12", None),
        (("answer",), "Answer: `12`", "12"),
        (("answer",), "Answer\uff1a12", "12"),
        (("boxed", "answer"), r"Answer: 3 \boxed{4}", "4"),
        (("answer", "boxed"), r"Answer: 3" "\n" r"\boxed{4}", "3"),
        (("boxed", "answer"), "Answer: 3", "3"),
    ],
)
def test_conventions_are_tried_in_order(conventions, text, answer):
    assert extract.extract(text, conventions) == answer


@pytest.mark.parametrize(
    "text",
    ["\\boxed{" * 50_000 + "}" * 50_000, "{" * 200_000 + "\\boxed{1}", "\\boxed{1} and " * 50_000]
    + ["\\boxed{" + " " * 200_000 + "}", "answer: " + " " * 200_000, "answer " * 50_000]
    + ["".join(rf"\boxed{{{i}}}" for i in range(50_000)), "\\boxed{" + "A)" * 495 + "}"]
    + ["\\boxed{" + "1," * 100_000 + "}", "$" * 200_000, "#### " * 50_000, "1 " * 100_000],
)
def test_preparing_a_job_takes_linear_time(text):
    """`prepare` runs in the main process, so no text may block it."""
    began = time.process_time()
    for verifier in (maths(tuple(extract.CONVENTIONS)), choice(), numeric(), exact()):
        verifier.prepare(problem("4"), text)
    assert time.process_time() - began < 2


VERIFIERS = [kind(tuple(extract.CONVENTIONS)) for kind in (maths, choice, numeric, exact)]
READERS = [
    *(functools.partial(extract.extract, conventions=(name,)) for name in extract.CONVENTIONS),
    *(plain_characters, normalise, bare, delimited, plain_number, evaluate, number_in, letter_in),
    *(listing, quantity, unit_name, is_counted, without_units, understood),
    lambda text: settle(text, "4"),
    lambda text: settle("4", text),
    lambda text: settle(text, f"{text}1"),
    *(lambda text, v=v: v.prepare(problem("4"), text) for v in VERIFIERS),
    *(lambda text, v=v: v.prepare(problem("4"), rf"\boxed{{{text}}}") for v in VERIFIERS),
    *(lambda text, v=v: v.prepare(problem(text), r"\boxed{4}") for v in VERIFIERS),
    *(lambda text, v=v: v.prepare(problem(text), text) for v in VERIFIERS),
    *(lambda text, v=v: v.prepare_gold(problem(text)) for v in VERIFIERS),
]
PATTERNS = ["$", r"\[", ";", "(", "{", "1", "1 ", "x=1,", " or ", "(B) or ", r"\text{ m }"]
PATTERNS += [r"\boxed{}", r"\boxed{1} and ", "Answer: 1\n", r"\frac", "0.1(3", "\u00b9", "</think>"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_readers_of_text_are_fast_on_long_texts(pattern):
    """These functions run in the main process."""
    text = (pattern * 100_000)[:100_000]
    for reader in READERS:
        began = time.process_time()
        reader(text)
        assert time.process_time() - began < 1, reader


# (gold answer, content of the box, whether it is right)
EQUAL = [
    (r"\frac{1}{2}", r"\dfrac{1}{2}", True),
    (r"\frac{1}{2}", "0.5", True),
    (r"\frac{1}{3}", "0.333333", True),
    (r"\frac{1}{3}", "0.33", False),
    ("16.\\overline{6}", r"\frac{50}{3}", True),
    (r"\frac{3}{2}", r"1\frac{1}{2}", True),
    (r"3\sqrt{13}", r"\sqrt{117}", True),
    (r"3\sqrt{13}", "3", False),
    ("6 - 5i", "-5i + 6", True),
    ("6 - 5i", "5", False),
    ("1,-2", "-2,1", True),
    ("1,-2", "1", False),
    ("x+1", "1+x", True),
    ("x+1", "y+1", False),
    (r"\sqrt{1/n}", r"\frac{1}{\sqrt{n}}", True),
    (r"|x|", "x", False),
    (r"\text{Evelyn}", "Evelyn", True),
    (r"\text{Evelyn}", "Angela", False),
    ("10000", r"10\,000", True),
    ("10000", "10{,}000", True),
    ("73", "73.", True),
    ("18", r"\$18", True),
    (r"\emptyset", r"\{\}", True),
    ("(2,3)", "x=2,y=3", True),
    (r"\{1,2\}", "1,2", True),
    ("(0,1)", "0<x<1", True),
    ("0<x<1", "(0,1)", True),
    ("[0,1)", "[0,1]", False),
    (r"50\%", "50", True),
    (r"50\%", "0.5", True),
    (r"50\%", "5", False),
    ("05:00", r"5:00 \text{ p.m.}", True),
    (r"5:00 \text{ a.m.}", r"5:00 \text{ p.m.}", False),
    ("4", r"\pm 4", False),
    ("4", "[0,10]", False),
    (r"30^\circ", r"30\text{ degrees}", True),
    (r"30^\circ", r"\frac{\pi}{6}", False),
]
# Pairs for which math-verify alone gives the wrong verdict.
GUARDED = [
    (r"\frac{1}{2004!}", r"\frac{1}{2006!}", False),
    (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}", False),
    ("0.0000001", "0.0000002", False),
    ("10^{-7}", "0.0000001", True),
    ("4", "5=4", False),
    ("4", "2+2=4", True),
    ("4", r"4\approx 5", False),
    (r"\sqrt{2}", r"\sqrt{2}\approx 1.414", True),
    ("1.414", r"\sqrt{2}\approx 1.414", False),
    (r"1,2,\ldots,n", r"1,3,\ldots,n", False),
    (r"1,2,\ldots,n", r"1, 2, \ldots, n", True),
    (r"10\text{ cm}", r"10\text{ m}", False),
    (r"10\text{ cm}", "10", True),
    ("10", "10m", True),
    (r"7\text{ cm}^2", r"7\text{ cm}", False),
    ("2516_8", "2516", False),
    ("2516_8", "2516_7", False),
    ("204_5", "204_{5}", True),
    ("12_{10}", "12", True),
    ("(1,2)", "1,2", False),
    ("1,2", "(1,2)", False),
    ("3t", "3", False),
    ("5", "2+3t", False),
    (r"\sin^2 t", r"\sin^2 m", False),
    ("C", "(C) 12", True),
    ("12", "(C) 12", True),
    ("C", "(D) 12", False),
]


# Spellings that models use, and answers that try to be right without deciding.
REVIEWED = [
    (r"x+1", r"x+2=x+1", False),
    (r"n^2", r"n^3=n^2", False),
    (r"2x", r"x=2x", False),
    (r"6", r"6\mathrm{i}", False),
    (r"2", r"2\mathrm{e}", False),
    (r"2", r"2\text{ pi}", False),
    (r"2", r"2\text{+1}", False),
    (r"8\sqrt{3}", r"8\sqrt{3}\mathrm{i}", False),
    (r"5", r"5\text{ million}", False),
    (r"5", r"5\text{ dozen}", False),
    (r"5\text{ million}", r"5", False),
    (r"60\text{ mph}", r"60\text{ km/h}", False),
    (r"20\text{ m/s}", r"20\text{ km/h}", False),
    (r"3\text{ L}", r"3\text{ mL}", False),
    (r"3\text{ hrs}", r"3\text{ mins}", False),
    (r"30^\circ", r"30\text{ rad}", False),
    (r"20^\circ\text{C}", r"20^\circ\text{F}", False),
    (r"7\text{ square feet}", r"7\text{ feet}", False),
    (r"3", r"3\text{ or 4}", False),
    (r"10", r"10\text{ (wrong, it is 11)}", False),
    (r"\text{Monday}", r"Monday\text{ or maybe Tuesday}", False),
    (r"even", r"even\text{ or odd}", False),
    (r"81, 256", r"81256", False),
    (r"[0,\frac1{2^{99}}]", r"[0,\frac1{2^{98}}]", False),
    (r"f(x)=\frac1{2^{99}}", r"f(x)=\frac1{2^{98}}", False),
    (r"\frac1{2004!}+x", r"\frac1{2006!}+x", False),
    (r"(3,4)", r"\{3,4\}", False),
    (r"\{3,4\}", r"(3,4)", False),
    (r"3:4:5", r"3:5:4", False),
    (r"1:2:3", r"1:3:2", False),
    (r"3:4:5", r"3/20", False),
    (r"BAC", r"ABC", False),
    (r"CBA", r"ABC", False),
    (r"C", r"(C)\text{ or }(D)", False),
    (r"A", r"(A) (B)", False),
    (r"1,2,3,...", r"1,2,3", False),
    (r"1,2,3", r"1,2,3,...", False),
    (r"34", r"3\,4", False),
    (r"2e^2", r"2\mathrm{e}^{2}", True),
    (r"2xe^{3}", r"2x\mathrm{e}^3", True),
    (r"\frac{1}{2}e^2", r"\frac{1}{2}\mathrm{e}^2", True),
    (r"81, 256", r"256, 81", True),
    (r"81, 256", r"\{81, 256\}", True),
    (r"81, 256", r"x=81, 256", True),
    (r"1:2:3", r"2:4:6", True),
    (r"30^\circ", r"30°", True),
    (r"5\text{ cm}^2", r"5\text{ cm}²", True),
    (r"110111", r"110111_2", True),
    (r"2516_8", r"x = 2516_8", True),
    (r"2516_8", r"2516_{(8)}", True),
    (r"2516_8", r"2516\text{ base }8", True),
    (r"42", r"42 apples", True),
    (r"42", r"42 ways", True),
    (r"42", r"\text{42 apples}", True),
    (r"18", r"18 per day", True),
    (r"1.85\ \text{USD}", r"1.85\ USD", True),
    (r"2 \text{ euros}", r"2 euros", True),
    (r"50\%", r"50", True),
    (r"12.5\%", r"12.5", True),
    (r"12.5\%", r"\frac{25}{2}", True),
    (r"12.5\%", r"12\frac12\%", True),
    (r"33\frac13\%", r"\frac{100}{3}\%", True),
    (r"\text{Evelyn}", r"\text{Evelyn.}", True),
    (r"\text{Evelyn}", r"\texttt{Evelyn}", True),
    (r"42", r"\text{42.}", True),
    (r"42", r"\underline{42}", True),
    (r"42", r"\large 42", True),
    (r"42", r"**42**", True),
    (r"6-5i", r"-5\mathrm{i}+6", True),
    (r"10\sqrt{2}", r"10√2", True),
    (r"1:3", r"1\colon3", True),
    (r"12:00", r"12{:}00", True),
    (r"60\text{ mph}", r"60\text{ miles per hour}", True),
    (r"7\text{ square feet}", r"7\text{ ft}^2", True),
    (r"20^\circ\text{C}", r"20", True),
    (r"4\pi\text{ cm}", r"4\pi\text{ centimeters}", True),
    (r"\$3.50", r"3.50", True),
    (r"x^2+x", r"x(x+1)", True),
    (r"2x", r"y=2x", True),
    (r"V=\pi r^2 h", r"\pi r^2h", True),
    (r"2r", r"AB+BC=2r", True),
    (r"\frac{x+1}{2}", r"0.5x+0.5", True),
    (r"81,256", r"81256", True),
]


@pytest.mark.parametrize(("gold", "answer", "right"), EQUAL + GUARDED + REVIEWED)
def test_maths_decides_whether_answers_are_equal(gold, answer, right):
    verdict = maths()(problem(gold), rf"Thus \boxed{{{answer}}}.")
    assert verdict == (MATCH if right else MISMATCH)


@pytest.mark.parametrize("gold", sorted({gold for gold, _, _ in EQUAL + GUARDED + REVIEWED}))
def test_every_gold_answer_verifies_against_itself(gold):
    verifier = maths()
    assert verifier(problem(gold), rf"\boxed{{{gold}}}") == MATCH
    prepared = verifier.prepare_gold(problem(gold))
    assert (prepared if isinstance(prepared, Verdict) else verifier.judge(prepared)) == MATCH


@pytest.mark.parametrize("gold", ["", " ", r"\frac{1}{", "1}{", r"\boxed{}"])
def test_an_empty_or_unbalanced_gold_answer_is_rejected(gold):
    assert not maths().prepare_gold(problem(gold)).correct


@pytest.mark.parametrize(
    ("text", "same"),
    [(r"\left( 3, \frac\pi2 \right)", r"(3,\frac{\pi}{2})"), (r"\frac12x", r"\frac{1}{2}x")]
    + [(r"29,\!322,\!216", "29322216"), (r"6, 8\text{, and }10", "6,8,10"), ("$ 9 $.", "9")]
    + [(r"\begin{pmatrix}1\\a\end{pmatrix}", r"\begin{pmatrix}1\\a\end{pmatrix}")]
    + [(r"\\frac{1}{2}", r"\frac{1}{2}"), (r"1 & \phantom -1", "1&1"), ("1 000 000", "1000000")],
)
def test_normalise_maps_equal_answers_to_one_text(text, same):
    assert normalise(text) == same
    assert normalise(same) == same


def test_plain_number_reads_integers_decimals_and_fractions():
    assert plain_number("007") == (7, False)
    assert plain_number("-.50") == (-0.5, True)
    assert plain_number(r"-\frac{6}{4}") == (-1.5, False)
    assert plain_number(r"2\frac{1}{2}") == (2.5, False)
    for text in ("1/0", "", "-", ".", "x", "1e5", "\N{FULLWIDTH DIGIT FOUR}", "1,2"):
        assert plain_number(text) is None


def test_exact_compares_texts_up_to_whitespace():
    assert exact()(problem("a b"), r"\boxed{a  b}") == MATCH
    assert exact()(problem("a b"), r"\boxed{A b}") == MISMATCH
    assert exact(ignore_case=True)(problem("a b"), r"\boxed{A b}") == MATCH
    assert exact(("text",))(problem("a b"), "thinking</think> a b ") == MATCH
    assert exact()(problem("a"), "a") == NO_ANSWER


def test_numeric_accepts_numbers_within_a_tolerance():
    verifier = numeric(relative_tolerance=0.01)
    assert verifier(problem("200"), r"\boxed{201.9 \text{ kg}}") == MATCH
    assert verifier(problem("200"), r"\boxed{202.1}") == MISMATCH
    assert verifier(problem("1,200.5"), r"\boxed{1.2e3}") == MATCH
    assert verifier(problem("0.5"), r"\boxed{\frac{1}{2}}") == MATCH
    assert verifier(problem("-3"), r"\boxed{3}") == MISMATCH
    for text in (r"9.8\text{ m/s}^2", "9.8 m/s^2", "g = 9.8", r"0.98 \times 10^{1}"):
        assert verifier(problem("9.8"), rf"\boxed{{{text}}}") == MATCH
    assert verifier(problem("3"), rf"\boxed{{{'1' * 400}}}") == NO_ANSWER
    assert verifier(problem("3"), r"\boxed{3 or 4}") == NO_ANSWER
    assert verifier(problem("3"), r"\boxed{three}") == NO_ANSWER
    assert verifier.prepare_gold(problem("three")) == Verdict(False, "not of this kind")
    assert numeric(absolute_tolerance=0.1)(problem("0"), r"\boxed{0.05}") == MATCH


@pytest.mark.parametrize(
    ("text", "value"),
    [(r"2\pi", 6.283185), ("10^{-3}", 0.001), ("1.5e3", 1500), (r"\sqrt[3]{27}", 3), ("4!", 24)]
    + [(r"\frac{3}{4}\text{ kg}", 0.75), ("2½", 2.5), ("3 million", 3e6), ("€1,200.50", 1200.5)]
    + [(r"F_{\text{net}} = 3 N", 3), (r"\sqrt{2} \approx 1.41", 1.41), ("-|2-5|", -3)]
    + [("0.(3)", 1 / 3), ("about 5 km", 5), ("2^{3}", 8), (r"-\sin(0)", 0), ("12 apples", 12)]
    + [(text, None) for text in (r"5\pi r", "5i", "<5", "x_2", "5=4", "5 squared", "4 tenths")]
    + [(text, None) for text in ("3 or 4", "", "x", "5 5", "(5", "9^{9^{9}}", "1/0", "(-8)^{0.5}")]
    + [("(" * 400 + "1" + ")" * 400, None), ("2 meters less than 5", None), ("5?", None)],
)
def test_a_number_is_read_only_from_all_of_the_text(text, value):
    found = number_in(text)
    assert found == (None if value is None else pytest.approx(value))


def test_choice_compares_letters():
    for text in (r"\boxed{C}", r"\boxed{(C)}", r"\boxed{\text{(C)}}", r"\boxed{C. because}"):
        assert choice()(problem("C"), text) == MATCH
        assert choice()(problem("(C) twelve"), text) == MATCH
        assert choice()(problem("D"), text) == MISMATCH
    assert choice()(problem("A"), r"\boxed{A, B}") == NO_ANSWER
    free = choice(("boxed", "text"))
    for text in ("So the answer is a bit unclear, but I pick (C).", "I think it's C"):
        assert free(problem("C"), text) == MATCH
    assert free(problem("D"), "A careful reading shows that the right option is D.") == MATCH
    assert free(problem("B"), "(A) is tempting. The correct choice is (B).") == MATCH
    assert free(problem("B"), "It's not A, so the answer is (B).") == MATCH
    assert free(problem("B"), "It is not A because of that, therefore B") == MATCH
    assert free(problem("B"), "no idea") == NO_ANSWER
    for text in ("(B) or maybe (C)", "(B), possibly (C)", "B/C", "(B)+1", "either (B) or (C)"):
        assert choice()(problem("B"), rf"\boxed{{{text}}}") == NO_ANSWER
        assert choice()(problem("C"), rf"\boxed{{{text}}}") == NO_ANSWER
    assert free(problem("B"), "I hesitate between (A) or (C). The answer is (B).") == MATCH
    assert free(problem("B"), "The answer is B, not A") == MATCH
    for gold in ("twelve", "A, C"):
        assert choice().prepare_gold(problem(gold)) == Verdict(False, "not of this kind")


def words_at_most(problem, response):
    """A verifier of the user's own: the problem limits the number of words."""
    return len(response.split()) <= problem.extra["words"]


def test_a_function_can_be_a_verifier():
    verifier = function("test_verifier:words_at_most")
    assert verifier(problem("", extra={"words": 3}), "one two three") == MATCH
    assert verifier(problem("", extra={"words": 2}), "one two three") == MISMATCH
    for name in ("test_verifier:absent", "no_such_module:f", "nonsense ", "test_verifier"):
        with pytest.raises(ValueError, match=r"cannot be imported|expected a function"):
            function(name)


def test_several_verifiers_can_be_combined():
    short = function("test_verifier:words_at_most")
    both = combine([maths(), short], every=True)
    either = combine([maths(), short], every=False)
    p = problem(r"\sqrt{8}", extra={"words": 3})
    right, wrong = r"\boxed{2\sqrt{2}}", r"\boxed{3\sqrt{2}}"
    assert both(p, right) == MATCH
    assert both(p, f"far too many words {right}") == MISMATCH
    assert both(p, wrong) == MISMATCH
    assert both(p, "no box") == NO_ANSWER
    assert either(p, f"far too many words {right}") == MATCH
    assert either(p, wrong) == MATCH
    assert either(p, f"far too many words {wrong}") == MISMATCH
    assert isinstance(both.prepare(p, "no box"), Verdict)  # no worker is needed
    for verifier in (both, combine([short, maths()], every=True)):
        assert not verifier.prepare_gold(problem(r"\frac{1}{")).correct
        assert verifier.judge(verifier.prepare_gold(problem(r"\sqrt{8}"))) == MATCH
    assert either.prepare_gold(problem("anything")).correct  # the function might accept it


def test_by_source_uses_the_verifier_of_the_problem_s_source():
    verifier = by_source({"maths": maths(), "quiz": choice(("text",))})
    assert verifier(problem("4", source="maths"), r"\boxed{2+2}") == MATCH
    assert verifier(problem("B", source="quiz"), "B") == MATCH
    assert verifier(problem("B", source="maths"), "B") == NO_ANSWER


def test_from_options_makes_every_kind():
    p = problem("12", extra={"words": 1})
    for changes, response, verdict in [
        ({}, r"\boxed{12}", MATCH),
        ({"answer": ("####", "answer")}, "Answer: 12", MATCH),
        ({"kind": "numeric", "relative_tolerance": 0.1}, r"\boxed{13}", MATCH),
        ({"kind": "exact"}, r"\boxed{12.0}", MISMATCH),
        ({"kind": "maths and test_verifier:words_at_most"}, r"so \boxed{12}", MISMATCH),
        ({"kind": "maths or test_verifier:words_at_most"}, r"so \boxed{12}", MATCH),
    ]:
        assert from_options(VerifierOptions(**changes))(p, response) == verdict
    for changes, message in [
        ({"kind": "math"}, "kind is 'math'; expected maths, exact, numeric, choice"),
        ({"kind": "maths and exact or choice"}, "only by ' and ' or only by ' or '"),
        ({"kind": "no_such_module:f"}, "No module named"),
        (
            {"answer": ("box",)},
            "answer contains the unknown convention 'box'; expected one or more of boxed, ####, an",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            from_options(VerifierOptions(**changes))


def test_prepare_returns_a_job_only_if_a_parser_is_needed():
    verifier = maths()
    assert isinstance(verifier, Verifier)
    assert verifier.prepare(problem("4"), r"\boxed{5}") == MISMATCH
    assert not isinstance(verifier.prepare(problem(r"\sqrt{8}"), r"\boxed{\sqrt{2}}"), Verdict)
    with pytest.raises(AssertionError):
        at_once(lambda problem, response: MATCH).judge(())


CASES = SHARED / "verifier"


@pytest.mark.skipif(not CASES.is_dir(), reason="the labelled responses are not available")
def test_labelled_responses_get_the_verdict_of_their_label():
    """The responses come from models and from the reference solutions of datasets."""
    for name, conventions in [
        ("derived_math500", ("boxed",)),
        ("rollouts_math_qwen", ("boxed",)),
        ("rollouts_gsm8k_gpt3", ("####",)),
    ]:
        verifier = maths(conventions)
        for line in (CASES / f"{name}.jsonl").open():
            row = json.loads(line)
            assert verifier(problem(row["gold"]), row["pred"]).correct == row["expect"], row["id"]


NONE = """None|nan|null|N/A|unknown|Not found|proof|See solution|see the proof.|no answer|?|-|TBD"""
WRAPPED = """Answer: 70|The answer is 70|Final answer: 70|ans = 70|#### 70|{"value": "70"}|
{'value': 70}|70 (approx)|70 (approximately)|70 (rounded to integers)"""
GOOD = r"""70|\text{None}|\text{no solution}|Evelyn|\{1,2\}|-1|x|2(3)|no solution|
\text{not possible}|(-1)|answer|(1,2)|f(x) = 2x|A"""


def test_gold_answers_that_are_none_are_refused():
    """As `None` or `See solution`, and with text around the answer. Other texts are kept."""
    golds = {
        answer.strip(): reason
        for answers, reason in (
            (NONE, "it says that there is no answer; expected an answer, or no such row"),
            (WRAPPED, "there is text around the answer; expected the answer alone"),
            (GOOD, ""),
        )
        for answer in answers.split("|")
    }
    found = check_golds(maths(), [Problem(i, "", "", answer) for i, answer in enumerate(golds)])
    assert dict(zip(golds, found, strict=True)) == golds
