"""Signals and notices of Google Cloud that ask a run to stop."""

import http.server
import signal
import threading
import time

import pytest

from opsd_jax.training import notices
from opsd_jax.training.signals import Interrupted, StopSignal


@pytest.fixture
def metadata(monkeypatch):
    """Google's metadata server: a dict of what it answers."""
    answers = {"preempted": "FALSE", "maintenance-event": "NONE"}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.removeprefix("/computeMetadata/v1/instance/")
            known = name in answers and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(answers.get(name, "").encode())

        def log_message(self, *words):
            pass

    server = http.server.ThreadingHTTPServer(("localhost", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("GCE_METADATA_HOST", f"localhost:{server.server_port}")
    monkeypatch.setattr(notices, "SECONDS", 0.02)
    yield answers
    server.shutdown()


@pytest.mark.parametrize(
    ("name", "value"),
    [("preempted", "TRUE"), ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")],
)
def test_a_notice_stops_as_sigterm_does(metadata, capfd, name, value):
    with StopSignal() as stop:
        time.sleep(0.2)
        stop.check()
        metadata[name] = value
        deadline = time.monotonic() + 10
        while not stop.received():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(Interrupted) as error:
            stop.check()
    assert error.value.exit_code == 128 + signal.SIGTERM
    assert f"notice of {name}: stopping soon" in capfd.readouterr().err


def test_a_migration_and_a_server_that_fails_stop_nothing(metadata):
    metadata["maintenance-event"] = "MIGRATE_ON_HOST_MAINTENANCE"
    del metadata["preempted"]
    with StopSignal() as stop:
        time.sleep(0.2)
        stop.check()
    assert notices.notice("localhost:1") == ""


def test_other_machines_ask_nobody(monkeypatch, tmp_path):
    monkeypatch.delenv("GCE_METADATA_HOST", raising=False)
    monkeypatch.setattr(notices, "PRODUCT", tmp_path / "product_name")
    assert notices.server() == ""
    notices.PRODUCT.write_text("Standard PC\n")
    assert notices.server() == ""
    notices.PRODUCT.write_text("Google Compute Engine\n")
    assert notices.server() == "metadata.google.internal"


def test_a_second_signal_acts_as_ever():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # some shells' jobs ignore it
    try:
        second_signal()
    finally:
        signal.signal(signal.SIGINT, before)


def second_signal():
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.received() == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
