"""Measures the maths verifier: its accuracy, its resistance to hostile answers, and its cost.

    python benchmarks/verifier.py [--cases DIR]
    python benchmarks/verifier.py --bugs FILE ...
    python benchmarks/verifier.py --peers PYTHON ... [--cases DIR]

DIR contains JSON lines with `gold`, `pred` and `expect`, in the files derived_math500,
rollouts_math_qwen, rollouts_gsm8k_gpt3, cases, probes and hostile. The benchmark prints every
wrong verdict, and the results as one JSON line at the end. With --bugs, it only scores FILEs of
JSON lines in the same format. Where `expect` is true, the gold answer has to be accepted too. Rows
with `control` are counted separately, and rows with `convention` are not scored.

With --peers, it compares the verdicts on the answers in DIR with those of lm-evaluation-harness and
lighteval. PYTHONs are the interpreters of environments that have them (see peers.py). It prints
each disagreement and who is right, and as its last line a JSON object: grader -> number of answers,
of right verdicts, and of disagreements in which `maths` or the grader is right.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import tempfile
import threading
import time
from typing import Any

from opsd_jax.problem import Problem
from opsd_jax.verify import extract
from opsd_jax.verify.maths import maths
from opsd_jax.verify.pool import VerifierPool
from opsd_jax.verify.verdict import Verifier
from opsd_jax.verify.verifiers import choice

CASES = pathlib.Path(__file__).parents[2] / "shared" / "data" / "verifier"
LEFT_OUT = ("disputed", "conflict", "convention")
REPEATS = 5
Row = dict[str, Any]


def read(path: pathlib.Path) -> list[Row]:
    """Returns the rows of a file that are scored, with `pred` joined from its parts."""
    rows = [json.loads(line) for line in path.open()]
    for row in rows:
        if "pred_parts" in row:
            row["pred"] = "".join(text * count for text, count in row["pred_parts"])
    return [row for row in rows if not any(row.get(flag) for flag in LEFT_OUT)]


def verify(rows: list[Row], verifier: Verifier) -> list[Any]:
    """Verifies the rows with a new pool, which has no cached verdicts; returns the verdicts."""
    with VerifierPool(verifier) as pool:
        futures = [
            pool.submit(Problem(i, "", "", r["gold"]), r["pred"]) for i, r in enumerate(rows)
        ]
        return [future.result() for future in futures]


def score(name: str, rows: list[Row], verifier: Verifier) -> int:
    """Returns the number of rows with the expected verdict, and prints the other rows."""
    right = 0
    for row, verdict in zip(rows, verify(rows, verifier), strict=True):
        right += verdict.correct == row["expect"]
        if verdict.correct != row["expect"]:
            print(
                f"{name} {row['id']}: {row['gold'][-60:]!r} | {row['pred'][-60:]!r} | "
                f"expected {row['expect']}, got {verdict.reason}"
            )
    return right


def score_public(rows: list[Row]) -> int:
    """Scores the cases of public test suites: whole texts, bare answers and multiple choice."""
    answers = [
        row | {"pred": rf"\boxed{{{row['pred']} }}"}
        for row in rows
        if row["kind"] == "answer" and "\\boxed" not in row["pred"]
    ]
    choices = [row for row in rows if row["kind"] == "mcq"]
    seen = {row["id"] for row in answers + choices}
    texts = [row for row in rows if row["id"] not in seen]
    return (
        score("public", answers, maths())
        + score("public", choices, choice(("boxed", "text")))
        + score("public", texts, maths(("boxed", "####", "text")))
    )


def score_bugs(paths: list[pathlib.Path]) -> dict[str, int]:
    """Scores cases of bug reports and their controls, and prints the rows with a wrong verdict."""
    rows = [row for path in paths for row in read(path)]
    with VerifierPool(maths()) as pool:
        problems = [Problem(i, "", "", row["gold"]) for i, row in enumerate(rows)]
        golds = [pool.submit_gold(problem) for problem in problems]
        golds_right = [future.result().correct for future in golds]
    counts = dict.fromkeys(("bugs_cases", "bugs_right", "controls", "controls_right"), 0)
    for row, gold_right, verdict in zip(rows, golds_right, verify(rows, maths()), strict=True):
        total, right = (
            ("controls", "controls_right") if row.get("control") else ("bugs_cases", "bugs_right")
        )
        counts[total] += 1
        if verdict.correct == row["expect"] and (gold_right or not row["expect"]):
            counts[right] += 1
        else:
            print(
                f"{right} {row['id']} ({row['cat']}): {row['gold']!r} | {row['pred']!r} | expected "
                f"{row['expect']}, got {verdict.reason}; gold answer accepted: {gold_right}"
            )
    return counts


def answers(directory: pathlib.Path) -> list[Row]:
    """Returns the rows whose answer `maths` extracts, with that `answer`."""
    rows = []
    for name in ("derived_math500", "rollouts_math_qwen", "rollouts_gsm8k_gpt3", "cases", "probes"):
        for row in read(directory / f"{name}.jsonl"):
            bare = row["kind"] == "answer" and "\\boxed" not in row["pred"]
            answer = row["pred"] if bare else extract.extract(row["pred"], ("boxed", "####"))
            if row["kind"] != "mcq" and answer:
                rows.append(row | {"answer": answer})
    return rows


def compare(pythons: list[str], rows: list[Row]) -> dict[str, dict[str, int]]:
    """Compares the verdicts of `maths` with those of other graders, and prints what differs."""
    text = "".join(json.dumps({key: row[key] for key in ("gold", "answer")}) + "\n" for row in rows)
    theirs: list[dict[str, bool]] = [{} for _ in rows]
    for python in pythons:
        command = [python, str(pathlib.Path(__file__).with_name("peers.py"))]
        output = subprocess.run(command, input=text, stdout=subprocess.PIPE, text=True, check=True)
        for verdicts, line in zip(theirs, output.stdout.splitlines(), strict=True):
            verdicts.update(json.loads(line))
    boxed = [row | {"pred": rf"\boxed{{{row['answer']} }}"} for row in rows]
    ours = [verdict.correct for verdict in verify(boxed, maths())]
    fields = ("answers", "right", "only_maths_right", "only_grader_right")
    counts = {
        name: dict.fromkeys(fields, 0) | {"answers": len(rows)} for name in ("maths", *theirs[0])
    }
    for row, our, verdicts in zip(rows, ours, theirs, strict=True):
        counts["maths"]["right"] += our == row["expect"]
        for name, verdict in verdicts.items():
            counts[name]["right"] += verdict == row["expect"]
            if verdict != our:
                winner = "only_maths_right" if our == row["expect"] else "only_grader_right"
                counts[name][winner] += 1
                print(f"{winner} {name} {row['id']}: {row['gold']!r} | {row['answer']!r}")
    return counts


def processes() -> dict[int, tuple[float, float]]:
    """Returns process id -> (CPU seconds, MiB) of this process and its descendants, on Linux."""
    stats: dict[int, list[str]] = {}
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # the process has ended
            stats[int(path.parent.name)] = path.read_text().rpartition(")")[2].split()
    family, before = {os.getpid()}, 0
    while len(family) > before:
        before = len(family)
        family |= {pid for pid, fields in stats.items() if int(fields[1]) in family}
    tick, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
    return {
        pid: ((int(f[11]) + int(f[12])) / tick, int(f[21]) * page / 2**20)
        for pid in family
        if (f := stats.get(pid))
    }


class Watch:
    """Samples the peak memory of this process's descendants, in MiB for the largest of them."""

    def __enter__(self):
        self.peak, self._stop = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def _run(self):
        while not self._stop.wait(0.02):
            for pid, (_, memory) in processes().items():
                if pid != os.getpid():
                    self.peak = max(self.peak, memory)

    def __exit__(self, *exc):
        self._stop.set()
        self._thread.join()


def hostile(rows: list[Row], innocent: list[Row]) -> int:
    """Returns the number of violations: code that ran, wrong verdicts, and exceeded limits.

    A wrong verdict on another row of the same batch also counts.
    """
    violations = 0

    def violation(row: Row, reason: str) -> None:
        nonlocal violations
        violations += 1
        print(f"hostile {row['id']} ({row['cat']}): {reason}")

    with tempfile.TemporaryDirectory() as directory:
        mark = pathlib.Path(directory) / "mark"
        rows = [
            row | {key: row[key].replace("%MARK%", str(mark)) for key in ("gold", "pred")}
            for row in rows
        ]
        with VerifierPool(maths(("boxed", "text"))) as pool:
            for row in rows:  # one at a time, to measure its time and memory
                began = time.monotonic()
                with Watch() as watch:
                    verdict = pool.submit(Problem(0, "", "", row["gold"]), row["pred"]).result()
                seconds = time.monotonic() - began
                if verdict.correct != row["expect"] and not row.get("lenient"):
                    violation(row, f"{verdict.reason}, expected {row['verdict']}")
                if seconds > row["max_seconds"] or watch.peak > row["max_mb"]:
                    violation(row, f"{seconds:.1f} s, {watch.peak:.0f} MiB")
                if mark.exists():
                    violation(row, "ran code")
                    mark.unlink()
        batch = [row for pair in zip(rows, innocent, strict=False) for row in pair]
        verdicts = verify(batch, maths(("boxed", "####", "text")))
        for row, verdict in list(zip(batch, verdicts, strict=True))[1::2]:
            if verdict.correct != row["expect"]:
                violation(row | {"cat": "innocent"}, verdict.reason)
    return violations


def cpu_seconds() -> float:
    """Returns the CPU seconds of this process and of its running descendants."""
    return sum(seconds for seconds, _ in processes().values())


def cost(rows: list[Row]) -> tuple[float, float]:
    """Returns the median seconds and CPU seconds of a warm pool for the rows."""
    wall, cpu = [], []
    for _ in range(REPEATS):
        with VerifierPool(maths(("boxed", "####"))) as pool:
            warm = [
                pool.submit(Problem(0, "", "", f"x^{i}"), rf"\boxed{{y^{i}}}") for i in range(9)
            ]
            for future in warm:
                future.result()
            before, began = cpu_seconds(), time.monotonic()
            futures = [
                pool.submit(Problem(i, "", "", r["gold"]), r["pred"]) for i, r in enumerate(rows)
            ]
            for future in futures:
                future.result()
            wall.append(time.monotonic() - began)
            cpu.append(cpu_seconds() - before)
    return statistics.median(wall), statistics.median(cpu)


def take(rows: list[Row], count: int) -> list[Row]:
    """Returns `count` rows, repeating the rows as often as necessary."""
    return (rows * -(-count // len(rows)))[:count]


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=pathlib.Path, default=CASES)
    parser.add_argument("--bugs", type=pathlib.Path, nargs="+", metavar="FILE")
    parser.add_argument("--peers", nargs="+", metavar="PYTHON")
    arguments = parser.parse_args()
    if arguments.peers:
        print(json.dumps(compare(arguments.peers, answers(arguments.cases))))
        return
    if arguments.bugs:
        print(json.dumps(score_bugs(arguments.bugs)))
        return
    directory = arguments.cases
    derived, qwen, gsm8k, cases, probes, attacks = (
        read(directory / f"{name}.jsonl")
        for name in (
            "derived_math500",
            "rollouts_math_qwen",
            "rollouts_gsm8k_gpt3",
            "cases",
            "probes",
            "hostile",
        )
    )
    results: dict[str, float] = {
        "derived_math500": score("derived", derived, maths()) / len(derived),
        "rollouts": (score("rollouts", qwen, maths()) + score("rollouts", gsm8k, maths(("####",))))
        / len(qwen + gsm8k),
        "public_cases": score_public(cases) / len(cases),
        "probes": score("probes", probes, maths()) / len(probes),
        "hostile_violations": hostile(attacks, take(qwen, len(attacks))),
    }
    rollouts = take(qwen + gsm8k, 1024)
    results["seconds_1024"], results["cpu_seconds_1024"] = cost(rollouts)
    every = len(rollouts) // 10  # 1 %
    slow = take([row for row in attacks if row["cat"] in ("tower", "factorial", "sum")], 10)
    for i, row in enumerate(slow):
        rollouts[i * every] = row
    results["seconds_1024_hostile"], _ = cost(rollouts)
    print(json.dumps({name: round(value, 4) for name, value in results.items()}))


if __name__ == "__main__":
    main()
