import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import datasets
import pytest
from compress.calibrate import hub
from compress.calibrate.errors import InputError
from compress.calibrate.hub import HubText, hub_problem, hub_reachable, parse_hub
from compress.calibrate.text import check_text, open_text
from huggingface_hub import constants


@pytest.fixture
def server(monkeypatch):
    """A stand-in for the Hub; its ``status`` and ``delay`` can be set."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            time.sleep(self.server.delay)
            self.send_response(self.server.status)
            self.end_headers()

        def do_GET(self):
            self.do_HEAD()

        def log_message(self, *args):
            pass

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.status, made.delay = 200, 0.0
    Thread(target=made.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{made.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture
def online(monkeypatch):
    monkeypatch.setattr(hub, "hub_problem", lambda: None)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "hub_problem", lambda: "the Hub is switched off (HF_HUB_OFFLINE)")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    return tmp_path


@pytest.fixture
def rows(monkeypatch):
    """Replaces ``load_dataset``; returns the list of rows served and the calls made."""
    served, calls = [{"text": "one", "n": 1}, {"text": "two", "n": 2}], []

    def load(name, config=None, *, split, streaming):
        calls.append((name, config, split, streaming))
        return iter(served)

    monkeypatch.setattr(datasets, "load_dataset", load)
    return served, calls


def test_spec_has_up_to_four_parts():
    assert parse_hub("org/name", "text", "o") == HubText("org/name", None, "train", "text")
    assert parse_hub("c4:en", "text", "o") == HubText("c4", "en", "train", "text")
    assert parse_hub("org/n::test:body", "text", "o") == HubText("org/n", None, "test", "body")


@pytest.mark.parametrize("spec", ["a/b/c", "a b", "x:1:2:3:4", ":en", "org/"])
def test_a_spec_that_can_be_no_dataset(spec):
    with pytest.raises(InputError, match="neither a text file nor the name of a Hub dataset"):
        check_text(spec)


def test_reachable(server):
    assert hub_reachable()
    server.status = 404
    assert hub_reachable()
    server.status = 503
    assert "status 503" in hub_problem()


def test_slow_hub_is_given_up(server):
    server.delay = 1.0
    start = time.monotonic()
    assert not hub_reachable(timeout=0.2)
    assert time.monotonic() - start < 0.8


def test_a_look_up_that_hangs_is_given_up(server, monkeypatch):
    def hang():
        time.sleep(0.5)
        raise OSError("too late to matter")

    monkeypatch.setattr(hub, "get_session", hang)
    assert "no answer within 0.1 s" in hub_problem(timeout=0.1)


def test_unreachable_without_raising(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "can't be reached" in hub_problem()
    monkeypatch.setattr(constants, "ENDPOINT", "not a\taddress")
    assert "isn't a web address" in hub_problem()


def test_offline_switch_is_honoured(server, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in hub_problem()


def test_rows_are_streamed(online, rows):
    source = open_text("org/name:cfg:test")
    assert source.documents == ["one", "two"]
    assert rows[1] == [("org/name", "cfg", "test", True)]
    assert "org/name, config cfg, split test, column text" in source.origin


def test_only_a_bounded_number_of_rows(online, rows, monkeypatch):
    monkeypatch.setattr(hub, "MAX_ROWS", 1)
    assert open_text("org/name").documents == ["one"]


def test_a_local_copy_serves_without_the_hub(offline, rows):
    with pytest.raises(InputError, match=r"HF_HUB_OFFLINE.*no copy.*'self'"):
        open_text("org/name")
    with pytest.raises(InputError, match="no copy"):
        check_text("org/name")
    (offline / "org___name").mkdir()
    check_text("org/name")
    assert open_text("org/name").documents == ["one", "two"]
    assert rows[1] == [("org/name", None, "train", False)]


def test_missing_column_names_the_nearest(online, rows):
    with pytest.raises(InputError, match=r"no column 'txt'; allowed: text, n; did you mean 'text'"):
        open_text("org/name:::txt")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (datasets.exceptions.DatasetNotFoundError("gone"), "no such dataset on the Hub"),
        (ValueError("BuilderConfig 'x' not found. Available: ['a', 'b']\nmore"), r"Available: \['a', 'b'\]\)"),
        (ConnectionError("Couldn't reach the Hub"), "Couldn't reach the Hub"),
        (RuntimeError("Dataset scripts are no longer supported"), "no longer supported"),
    ],
)
def test_faults_of_the_library_become_input_errors(online, monkeypatch, fault, message):
    def fail(*args, **kwargs):
        raise fault

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(InputError, match=message):
        open_text("org/name:x")


def test_a_connection_lost_on_the_way_is_told(online, monkeypatch):
    def broken(*args, **kwargs):
        yield {"text": "one"}
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(datasets, "load_dataset", broken)
    with pytest.raises(InputError, match="reset by peer"):
        open_text("org/name")


def test_preflight_finds_an_unknown_dataset(online, monkeypatch):
    from huggingface_hub.errors import RepositoryNotFoundError

    asked = []

    def info(self, name, *, timeout):
        asked.append(name)
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr(hub.HfApi, "dataset_info", info)
    with pytest.raises(InputError, match="no such dataset"):
        check_text("org/nmae")
    assert asked == ["org/nmae"]
