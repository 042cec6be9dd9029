"""Nothing reaches the network: neither code of this package nor the libraries that it loads."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request

import pytest

QUESTION = {"sample": "row.jpg", "question": "What is the capital of the country of the second flag from the left?"}
TELEMETRY_S = 14  # ONNX Runtime's telemetry, if it were on, would be sent about ten seconds after a session is opened
SERVE = [sys.executable, "-m", "gog_edge.serve", "--port", "0", "--threads", "1"]

# Logs every use of a socket that names another address, and every name lookup.
AUDIT_HOOK = """
import os, sys

WATCHED = ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "socket.gethostbyname",
           "socket.gethostbyaddr", "socket.getnameinfo")
log = os.open(os.environ["SOCKET_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

def record(event, arguments):
    if event in WATCHED and not (event == "socket.sendmsg" and arguments[1] is None):
        os.write(log, f"{event} {arguments[1:] if event[7] in 'cs' else arguments}\\n".encode())

sys.addaudithook(record)
os.write(log, b"watching\\n")
"""
ANSWER = """
import sys
from gog_edge.bundle import DEFAULT_BUNDLE
from gog_edge.runtime import open_runtime
runtime = open_runtime(DEFAULT_BUNDLE, threads=1)
picture = (DEFAULT_BUNDLE / "samples" / sys.argv[1]).read_bytes()
print(runtime.answer(picture, sys.argv[2], lambda event: None).answer)
"""
# Runs where there is no network but a loopback interface that is down.
ISOLATED = """
import fcntl, socket, struct, sys
sys.path.insert(0, sys.argv[1])
from test_offline import SERVE, ask_server
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
    fcntl.ioctl(control, 0x8914, struct.pack("16sh", b"lo", 0x41))  # SIOCSIFFLAGS: IFF_UP | IFF_RUNNING
    assert control.connect_ex(("192.0.2.1", 9)) != 0  # no route
print(ask_server(SERVE)["answer"])
"""


def ask_server(command, wait_s=0.0, **options):
    """Start a server, ask it a question in two ways and search, stop it; return the answer."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True, **options) as process:
        try:
            url = next(word for word in process.stdout.readline().split() if word.startswith("http://"))
            post(url + "/v1/ask", QUESTION, "text/event-stream")
            post(url + "/v1/search", {"text": "Riga"})
            answer = json.loads(post(url + "/v1/ask", QUESTION))
            time.sleep(wait_s)
        finally:
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)
    return answer


def post(url, body, accept="application/json"):
    headers = {"Content-Type": "application/json", "Accept": accept}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=120) as response:
        return response.read()


@pytest.fixture
def audited(tmp_path):
    """An environment in which Python logs its use of sockets, and a function that returns the log."""
    (tmp_path / "sitecustomize.py").write_text(AUDIT_HOOK)
    log = tmp_path / "sockets.log"
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "SOCKET_LOG": str(log)}
    return environment, lambda: log.read_text().splitlines()


def test_the_audit_hook_records_connections_and_lookups(audited):
    environment, recorded = audited
    code = ("import sys; sys.audit('socket.connect', None, ('192.0.2.1', 9)); "
            "sys.audit('socket.getaddrinfo', 'example.org', 443, 0, 0, 0)")
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert recorded() == ["watching", "socket.connect (('192.0.2.1', 9),)",
                          "socket.getaddrinfo ('example.org', 443, 0, 0, 0)"]


def test_a_server_that_answers_connects_to_nothing(audited):
    environment, recorded = audited
    assert ask_server(SERVE, env=environment)["answer"] == "Helsinki"
    assert recorded() == ["watching"]


def test_a_policy_that_answers_connects_to_nothing(audited):
    environment, recorded = audited
    done = subprocess.run([sys.executable, "-c", ANSWER, *QUESTION.values()], env=environment, capture_output=True,
                          text=True, check=True)
    assert done.stdout == "Helsinki\n" and recorded() == ["watching"]


def traceable():
    strace = shutil.which("strace")
    return strace and subprocess.run([strace, "-o", os.devnull, "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not traceable(), reason="needs strace")
def test_the_native_libraries_of_a_server_connect_to_nothing(tmp_path):
    """Watched for as long as telemetry would take to be sent."""
    log = tmp_path / "calls.log"
    trace = ["strace", "-f", "-qq", "-e", "trace=bind,connect,sendto,sendmsg,sendmmsg", "-o", str(log)]
    assert ask_server([*trace, *SERVE], wait_s=TELEMETRY_S)["answer"] == "Helsinki"
    calls = log.read_text().splitlines()
    addressed = [call for call in calls if re.search(r"sa_family=AF_INET6?\b", call)]
    assert any(" bind(" in call for call in addressed)  # the trace has the server's own socket
    assert [call for call in addressed if " bind(" not in call] == []


def isolatable():
    unshare = shutil.which("unshare")
    return unshare and subprocess.run([unshare, "-rn", "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not isolatable(), reason="needs network namespaces")
def test_a_server_answers_without_a_network(pytestconfig):
    command = ["unshare", "-rn", sys.executable, "-c", ISOLATED, str(pytestconfig.rootpath / "tests")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Helsinki\n"


def test_telemetry_is_off_before_the_runtime_is_loaded():
    code = "import gog_edge.engines.onnx.session, os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={key: value for key, value in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"})
    assert done.stdout == "1\n"


