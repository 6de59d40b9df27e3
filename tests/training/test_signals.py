"""Signals, and notices from Google Cloud, that ask a run to stop."""

import http.server
import signal
import threading
import time

import pytest

from opsd_jax.training import notices
from opsd_jax.training.signals import Interrupted, StopSignal


@pytest.fixture
def metadata(monkeypatch):
    """A fake of Google's metadata server. The fixture is the values that it returns, by key."""
    answers = {"preempted": "FALSE", "maintenance-event": "NONE"}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.removeprefix("/computeMetadata/v1/instance/")
            known = name in answers and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(answers.get(name, "").encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("localhost", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("GCE_METADATA_HOST", f"localhost:{server.server_port}")
    monkeypatch.setattr(notices, "POLL_SECONDS", 0.02)
    yield answers
    server.shutdown()


@pytest.mark.parametrize(
    ("name", "value"),
    [("preempted", "TRUE"), ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")],
)
def test_a_notice_stops_the_run_like_sigterm(metadata, capfd, name, value):
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


def test_a_migration_or_a_failing_server_does_not_stop_the_run(metadata):
    metadata["maintenance-event"] = "MIGRATE_ON_HOST_MAINTENANCE"
    del metadata["preempted"]
    with StopSignal() as stop:
        time.sleep(0.2)
        stop.check()
    assert notices.current_notice("localhost:1") == ""


def test_machines_outside_google_cloud_ask_no_server(monkeypatch, tmp_path):
    monkeypatch.delenv("GCE_METADATA_HOST", raising=False)
    monkeypatch.setattr(notices, "PRODUCT", tmp_path / "product_name")
    assert notices.metadata_host() == ""
    notices.PRODUCT.write_text("Standard PC\n")
    assert notices.metadata_host() == ""
    notices.PRODUCT.write_text("Google Compute Engine\n")
    assert notices.metadata_host() == "metadata.google.internal"


def test_a_second_signal_reaches_the_previous_handler():
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # background jobs may ignore SIGINT
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
