"""The pool gives verdicts whatever happens to its workers, and leaves no process behind."""

import collections
import contextlib
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time

import judges
import psutil
import pytest
from paths import SUPPORT

from opsd_jax.problem import Problem
from opsd_jax.verify import pool as pool_lib
from opsd_jax.verify.maths import maths
from opsd_jax.verify.pool import PoolError, PoolOptions, VerifierPool, check_golds
from opsd_jax.verify.verdict import Verdict, Verifier
from opsd_jax.verify.verifiers import at_once

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
ANY = Problem(0, "", "", "4")


def is_running(process):
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def servers():
    """Returns the processes that fork this process's workers."""
    found = []
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # it ends while we look at it
            if is_running(process) and "multiprocessing.forkserver" in " ".join(process.cmdline()):
                found.append(process)
    return found


def running_workers():
    """Returns the worker processes of this process."""
    found = set()
    for server in servers():
        with contextlib.suppress(psutil.Error):
            found.update(worker for worker in server.children() if is_running(worker))
    return found


def verdicts(judge, responses, problem=ANY, **options):
    with VerifierPool(judge, PoolOptions(workers=2, **options)) as pool:
        futures = [pool.submit(problem, response) for response in responses]
        return [future.result(timeout=60) for future in futures]


@pytest.mark.parametrize(
    ("response", "verdict"),
    [
        ("sleep 30", Verdict(False, "timeout")),
        ("spin", Verdict(False, "timeout")),
        ("eat 2000", Verdict(False, "memory")),
        ("die SIGABRT", Verdict(False, "crash")),
        ("die SIGSEGV", Verdict(False, "crash")),
        ("die SIGKILL", Verdict(False, "crash")),  # at every attempt
        ("die SIGXCPU", Verdict(False, "timeout")),
        ("exit", Verdict(False, "verifier SystemExit")),
        ("raise x", Verdict(False, "verifier LookupError")),
        ("answer yes", Verdict(False, "verifier TypeError")),
    ],
)
def test_a_misbehaving_job_costs_only_its_own_verdict(response, verdict):
    responses = [f"fine {i}" for i in range(20)]
    responses.insert(7, response)
    began = time.monotonic()
    got = verdicts(judges.misbehave, responses, seconds=1.0)
    assert got.pop(7) == verdict
    assert got == [Verdict(True, "fine")] * 20
    assert time.monotonic() - began < 15


def test_the_memory_limit_applies_to_each_job():
    """Jobs that fit pass, even if all of them together would not."""
    got = verdicts(judges.misbehave, [f"eat {300 + i}" for i in range(8)], seconds=60.0)
    assert got == [Verdict(True, "eat")] * 8


def test_the_options_set_the_limits():
    responses = ["fine", "sleep 5", "eat 300"]
    got = verdicts(judges.misbehave, responses, seconds=0.5, memory_mb=100)
    assert [v.reason for v in got] == ["fine", "timeout", "memory"]


def test_equal_jobs_are_judged_once():
    with VerifierPool(maths(), PoolOptions(workers=2)) as pool:
        futures = [
            pool.submit(Problem(i, "", "", r"\sqrt{8}"), rf"Thus \boxed{{{answer}}}")
            for i in range(50)
            for answer in (r"2\sqrt{2}", r"2 \sqrt 2", r"3\sqrt{2}", r"\sqrt{8}", "")
        ]
        reasons = [future.result(timeout=60).reason for future in futures]
        assert reasons == ["match", "match", "mismatch", "match", "no answer"] * 50
        assert pool.judged == 2  # the others are equal to these, or need no parser
        assert pool.submit(ANY, r"\boxed{4}").done()


def test_a_timeout_is_not_cached(tmp_path):
    with VerifierPool(judges.misbehave, PoolOptions(workers=1, seconds=0.5)) as pool:
        response = f"once {tmp_path / 'started'}"
        assert pool.submit(ANY, response).result(timeout=60) == Verdict(False, "timeout")
        assert pool.submit(ANY, response).result(timeout=60) == Verdict(True, "once")
        assert pool.submit(ANY, response).done()


def test_a_worker_is_replaced_after_so_many_jobs(monkeypatch):
    """No job is lost at a replacement."""
    monkeypatch.setattr(pool_lib, "JOBS_PER_WORKER", 5)
    with VerifierPool(judges.worker_id, PoolOptions(workers=1)) as pool:
        futures = [pool.submit(ANY, f"fine {i}") for i in range(23)]
        got = [future.result(timeout=60) for future in futures]
    assert all(verdict.correct for verdict in got)
    jobs = collections.Counter(verdict.reason for verdict in got)
    assert sorted(jobs.values()) == [3, 5, 5, 5, 5]


def test_a_process_that_a_judge_started_ends_with_its_worker(tmp_path):
    path = tmp_path / "pid"
    got = verdicts(judges.misbehave, [f"child {path}"], seconds=0.5)
    assert got == [Verdict(False, "timeout")]
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(int(path.read_text()))
        deadline = time.monotonic() + 5
        while is_running(process):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_judge_that_returns_no_verdict_costs_only_its_own_job():
    verifier = Verifier(lambda problem, response: response, judges.odd)
    reasons = [v.reason for v in verdicts(verifier, ["none", "true", "list", "x", "object"])]
    assert reasons[:3] == ["verifier TypeError", "verifier TypeError", "verifier ValueError"]
    assert reasons[3] == "verifier KeyError"
    assert reasons[4].startswith("<object")


def test_a_job_that_cannot_be_pickled_costs_only_its_own_verdict():
    verifier = Verifier(lambda problem, response: lambda: response, judges.odd)
    assert not verdicts(verifier, ["x"])[0].correct


def test_a_worker_that_is_never_ready_is_an_error(monkeypatch):
    monkeypatch.setattr(pool_lib, "START_SECONDS", 1.0)
    monkeypatch.setattr(pool_lib, "MAX_FAILED_STARTS", 2)
    verifier = Verifier(lambda problem, response: response, judges.Hanging())
    with pytest.raises(PoolError, match="not ready after 1 s"):
        verdicts(verifier, ["x"])


def test_no_worker_starts_without_a_job():
    before = len(psutil.Process().children(recursive=True))
    with VerifierPool(at_once(lambda problem, response: Verdict(True, "match"))) as pool:
        assert pool.submit(ANY, "").result() == Verdict(True, "match")
        assert len(psutil.Process().children(recursive=True)) == before


def test_an_exception_in_the_calling_process_costs_only_its_own_verdict():
    def judge(problem, response):
        return Verdict(1 / len(response) > 0, "match")

    with VerifierPool(at_once(judge)) as pool:
        assert pool.submit(ANY, "").result() == Verdict(False, "verifier ZeroDivisionError")
        assert pool.submit(ANY, "x").result() == Verdict(True, "match")


def test_several_threads_can_share_a_pool():
    """math-verify itself works only in a main thread."""
    results = {}
    with VerifierPool(maths(), PoolOptions(workers=2, seconds=30.0)) as pool:

        def submit(i):
            future = pool.submit(
                Problem(i, "", "", r"\frac{1}{3}"), rf"\boxed{{\frac{{{i}}}{{x}}}}"
            )
            same = pool.submit(Problem(i, "", "", r"x+1"), r"\boxed{1+x}")
            results[i] = future.result(timeout=60), same.result(timeout=60)

        threads = [threading.Thread(target=submit, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == {i: (Verdict(False, "mismatch"), Verdict(True, "match")) for i in range(8)}


def test_workers_killed_at_random():
    """2,000 jobs, while a worker is killed about every 50 ms, and now and then the server.

    Between two kills at least one job ends. Otherwise, on a machine so busy that workers need
    longer than 50 ms to start, the kills would come faster than the pool promises to bear.
    """
    rng, kills, done, seen = random.Random(0), 0, threading.Event(), set()
    pool = VerifierPool(judges.double, PoolOptions(workers=2))

    def kill():
        nonlocal kills
        judged = 0
        while not done.wait(rng.uniform(0.01, 0.1)):
            if pool.judged == judged:
                continue
            judged, workers = pool.judged, running_workers()
            seen.update(workers)
            victims = servers() if rng.random() < 0.01 else list(workers)
            with contextlib.suppress(psutil.NoSuchProcess, IndexError):
                rng.choice(victims).send_signal(rng.choice([signal.SIGKILL, signal.SIGTERM]))
                kills += 1

    with pool:
        pool.submit(ANY, "8").result(timeout=60)
        killer = threading.Thread(target=kill)
        killer.start()
        problems = [Problem(i, "", "", str(i)) for i in range(2000)]
        futures = [pool.submit(p, str(2 * p.id + p.id % 2)) for p in problems]
        got = [future.result(timeout=120) for future in futures]
        done.set()
        killer.join()
        seen.update(running_workers())
    assert kills > 20
    assert [v.correct for v in got] == [i % 2 == 0 for i in range(2000)]
    assert {v.reason for v in got} == {"match", "mismatch"}
    assert len(seen) > kills / 2
    # A worker whose server was killed during its start ends when it reads its closed pipe.
    deadline = time.monotonic() + 30
    while alive := [worker for worker in seen if is_running(worker)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.1)


SCRIPT = """
import os, signal, sys, time
sys.path.insert(0, {tests!r})
import judges
from opsd_jax.problem import Problem
from opsd_jax.verify.pool import PoolOptions, VerifierPool

def main():
    # A background job of a shell inherits that SIGINT is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    pool = VerifierPool(judges.misbehave, PoolOptions(workers=2, seconds=30.0))
    futures = [
        pool.submit(Problem(0, "", "", ""), f"{{what}} {marks}/{{i}}")
        for i, what in enumerate(("mark", "mark-spin"))
    ]
    while len(os.listdir({marks!r})) < 2:
        time.sleep(0.01)
    print("busy", flush=True)
    input()
    {end}

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize(
    "end",
    [
        "time.sleep(60)  # SIGTERM",
        "time.sleep(60)  # SIGKILL",
        "time.sleep(60)  # SIGINT",
        "raise ValueError('an error')",
        "sys.exit(4)",
        "os._exit(5)",
        "pool.close()",
        "pass",
    ],
)
def test_no_worker_outlives_its_parent(tmp_path, end):
    """One worker sleeps and one runs native code; both are far from their time limit."""
    marks = tmp_path / "marks"
    marks.mkdir()
    script = tmp_path / "script.py"
    tests = str(SUPPORT)
    script.write_text(SCRIPT.format(tests=tests, marks=str(marks), end=end))
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout.readline() == b"busy\n"
    below = psutil.Process(process.pid).children(recursive=True)
    assert len(below) >= 3  # a server and two workers
    process.stdin.write(b"\n")
    process.stdin.flush()
    if "# SIG" in end:
        process.send_signal(getattr(signal, end.split()[-1]))
    process.wait(timeout=10)
    _, alive = psutil.wait_procs(below, timeout=5)
    assert alive == []


def test_closing_a_pool_fails_its_waiting_jobs():
    with VerifierPool(judges.misbehave, PoolOptions(workers=1)) as pool:
        futures = [pool.submit(ANY, f"sleep {1 + i / 100}") for i in range(20)]
    with pytest.raises(PoolError, match="closed"):
        futures[-1].result(timeout=5)
    with pytest.raises(PoolError, match="closed"):
        pool.submit(ANY, "sleep 3")


def test_workers_that_cannot_start_are_an_error(tmp_path):
    """This script lacks the `__main__` guard, so each worker runs it. No verdict is invented."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(SUPPORT)!r})
        import judges
        from opsd_jax.problem import Problem
        from opsd_jax.verify.pool import PoolOptions, VerifierPool
        pool = VerifierPool(judges.misbehave, PoolOptions(workers=2))
        print(pool.submit(Problem(0, "", "", ""), "fine").result(timeout=60))
        """)
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "PoolError" in done.stderr
    assert "if __name__ == '__main__':" in done.stderr
    assert done.stdout == ""


def test_a_future_is_shared_and_cannot_be_cancelled():
    with VerifierPool(judges.misbehave, PoolOptions(workers=1)) as pool:
        first, second = (pool.submit(ANY, "sleep 0.2") for _ in range(2))
        assert not first.cancel()
        assert second.result(timeout=60) == first.result() == Verdict(True, "sleep")
        assert pool.judged == 1


def test_a_judge_that_cannot_be_sent_is_refused():
    with pytest.raises(
        ValueError, match="expected a function defined at the top level of a module"
    ):
        VerifierPool(lambda problem, response: True)


@LINUX
def test_pools_leave_no_files_open():
    count = lambda: len(os.listdir("/proc/self/fd"))
    verdicts(judges.misbehave, ["fine"])  # starts the server process
    before = count()
    for _ in range(5):
        assert verdicts(judges.misbehave, ["fine"]) == [Verdict(True, "fine")]
    assert count() <= before


@LINUX
def test_a_lower_limit_of_the_session_is_kept():
    """A shell's `ulimit` may be lower than the limit that a worker sets for itself."""
    with VerifierPool(judges.misbehave, PoolOptions(workers=1)) as pool:
        assert pool.submit(ANY, "limit").result(timeout=60) == Verdict(True, "limit")
        assert pool.submit(ANY, "fine").result(timeout=60) == Verdict(True, "fine")
        assert pool.submit(ANY, "eat 400").result(timeout=60) == Verdict(False, "memory")


def test_check_golds_verifies_each_answer_against_itself(monkeypatch):
    monkeypatch.setattr(pool_lib, "PATIENT", PoolOptions(seconds=1.5))
    golds = [r"\frac{1}{2}", "12", r"\text{Evelyn}", r"\frac{1}{", r"\boxed{x+1}", "9^{9^{9^{9}}}"]
    problems = [Problem(i, "", "", gold) for i, gold in enumerate(golds)]
    broken = "empty, or its braces do not match"
    assert check_golds(maths(), problems) == ["", "", "", broken, "", "timeout"]
    assert check_golds(judges.misbehave, problems) == [""] * 6  # it cannot check gold answers


def broken(problem, response):
    if response.startswith("bad"):
        raise KeyError("answer")
    return True


def test_the_first_failures_are_logged_with_their_traceback(caplog):
    responses = [f"bad {i}" for i in range(10)] + ["good"] * 10
    for verifier in (broken, at_once(broken_at_once)):
        caplog.clear()
        found = verdicts(verifier, responses)
        assert [v.correct for v in found] == [False] * 10 + [True] * 10
        logged = [r.getMessage() for r in caplog.records if "verifier failed" in r.getMessage()]
        assert len(logged) == pool_lib.LOGGED_FAILURES
        assert all("Traceback" in text and "KeyError: 'answer'" in text for text in logged)


def broken_at_once(problem, response):
    return Verdict(broken(problem, response), "match")


@pytest.mark.parametrize("verifier", [broken, at_once(broken_at_once)], ids=["worker", "at once"])
def test_a_verifier_that_mostly_fails_ends_the_pool(verifier):
    responses = [f"{'bad' if i % 3 else 'good'} {i}" for i in range(120)]
    with pytest.raises(PoolError, match=r"failed for \d+ of \d+ responses.*config.pool.failures"):
        verdicts(verifier, responses)
    few = [f"{'good' if i % 3 else 'bad'} {i}" for i in range(120)]
    assert sum(v.correct for v in verdicts(verifier, few)) == 80
    with VerifierPool(verifier, PoolOptions(failures=1.0)) as pool:
        futures = [pool.submit(ANY, f"bad {i}") for i in range(120)]
        assert not any(future.result().correct for future in futures)


@pytest.mark.parametrize("correct", ["no", None, 0.5, [True]])
def test_a_verdict_that_is_no_bool_is_a_failure(correct):
    found = verdicts(at_once(lambda problem, response: Verdict(correct, "match")), ["x"])
    assert found == [Verdict(False, "verifier TypeError")]
