"""`python -m gog_edge.serve`: what it says, and how it refuses."""

import signal
import socket
import subprocess
import sys

import httpx
import pytest

from gog_edge.bundle import DEFAULT_BUNDLE, open_bundle
from gog_edge.errors import BackendError
from gog_edge.planner import plan_memory
from gog_edge.serve.__main__ import main
from gog_edge.serve.server import bind, url_of


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_says_what_it_takes_and_where_it_is_then_serves_then_stops(sign):
    command = [sys.executable, "-m", "gog_edge.serve", "--port", "0", "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        url = next(word for word in line.split() if word.startswith("http://127.0.0.1:"))
        assert not url.endswith(":0")
        assert httpx.get(url + "/readyz", timeout=60).status_code == 200
        sample = open_bundle(DEFAULT_BUNDLE).samples[0]
        body = {"sample": sample.picture.name, "question": sample.questions[0]}
        answer = httpx.post(url + "/v1/ask", json=body, timeout=60)
        assert answer.json()["answer"]
        process.send_signal(sign)
        assert process.wait(60) in (0, -sign)
        assert process.stdout.read() == ""
        (plan,) = process.stderr.read().splitlines()
        assert plan == f"gog_edge takes up to {plan_memory(open_bundle(DEFAULT_BUNDLE))}"


def test_port_in_use(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["--port", str(port), "--bundle", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert f"port {port} on 127.0.0.1" in err and "--port" in err and err.count("\n") == 1


def test_no_bundle(tmp_path, capsys):
    assert main(["--port", "0", "--bundle", str(tmp_path)]) == 2
    assert "bundle.toml" in capsys.readouterr().err


@pytest.mark.parametrize("port", [-1, 70_000])
def test_no_such_port(port):
    with pytest.raises(BackendError, match=str(port)):
        bind("127.0.0.1", port)


def test_address_that_is_not_of_this_machine():
    with pytest.raises(BackendError, match=r"192\.0\.2\.1"):
        bind("192.0.2.1", 0)


def test_url_that_a_browser_can_open():
    with bind("0.0.0.0", 0) as listener:
        assert url_of(listener, "0.0.0.0") == f"http://127.0.0.1:{listener.getsockname()[1]}"
