"""`python -m gog_edge.serve`: the same command as `gog-edge serve`, its output and its errors."""

import os
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
def test_prints_its_plan_and_address_then_serves_then_stops(sign):
    command = [sys.executable, "-m", "gog_edge.serve", "--port", "0", "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        url = next(word for word in line.split() if word.startswith("http://127.0.0.1:"))
        assert not url.endswith(":0")
        assert httpx.get(url + "/readyz", timeout=60).status_code == 200
        sample = open_bundle(DEFAULT_BUNDLE).samples[0]
        body = {"sample": sample.picture.name, "question": sample.questions[0]}
        answer = httpx.post(url + "/v1/ask", json=body, timeout=60).json()
        assert answer["answer"] == "Helsinki" and answer["citations"]
        process.send_signal(sign)
        assert process.wait(60) in (0, -sign)
        assert process.stdout.read() == ""
        (plan,) = process.stderr.read().splitlines()
        assert plan == f"gog_edge takes up to {plan_memory(open_bundle(DEFAULT_BUNDLE))}"


def exit_code(*arguments):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    return exit.value.code


def test_the_module_and_the_command_are_one(monkeypatch):
    helps = {}
    for name, arguments in {"module": ["--help"], "command": ["serve", "--help"]}.items():
        run = ["-m", "gog_edge.serve" if name == "module" else "gog_edge.cli", *arguments]
        done = subprocess.run([sys.executable, *run], capture_output=True, text=True, check=True,
                              env=os.environ | {"COLUMNS": "120"})
        helps[name] = done.stdout[done.stdout.index("Serve a bundle") :]
    assert helps["module"] == helps["command"] and "--traces" in helps["module"]
    assert exit_code("--no-such-option") == exit_code("--port", "many") == 2


def test_port_in_use(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert exit_code("--port", str(port), "--bundle", str(tmp_path)) == 1
    err = capsys.readouterr().err
    assert f"port {port} on 127.0.0.1" in err and "--port" in err and err.count("\n") == 1


def test_no_bundle(tmp_path, capsys):
    assert exit_code("--port", "0", "--bundle", str(tmp_path)) == 1
    assert "bundle.toml" in capsys.readouterr().err


@pytest.mark.parametrize("port", [-1, 70_000])
def test_port_out_of_range(port):
    with pytest.raises(BackendError, match=str(port)):
        bind("127.0.0.1", port)


def test_address_of_another_machine():
    with pytest.raises(BackendError, match=r"192\.0\.2\.1"):
        bind("192.0.2.1", 0)


def test_url_of_a_wildcard_address():
    with bind("0.0.0.0", 0) as listener:
        assert url_of(listener, "0.0.0.0") == f"http://127.0.0.1:{listener.getsockname()[1]}"
