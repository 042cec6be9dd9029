"""Engines that cannot be had or are lost: the server stays up, says why, and is ready once they can be had."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import httpx
import pytest
from built_engines import build, cuda_on_processor, toy  # noqa: F401
from played import Flags, Player, Still

from gog_edge.engines.manifest import MANIFEST, ORT_CUDA, TENSORRT_RTX
from gog_edge.engines.registry import EngineChoice
from gog_edge.errors import BackendError, DeviceLost, OutOfDeviceMemory, PackError
from gog_edge.files import describe_files, read_json, write_json
from gog_edge.policy.local import LocalPolicy
from gog_edge.retrieval.encoder import Encoder
from gog_edge.retrieval.registry import Shelf
from gog_edge.runtime import open_runtime
from gog_edge.serve import supervisor as supervision
from gog_edge.serve.__main__ import main
from gog_edge.serve.server import supervise
from gog_edge.serve.supervisor import Supervisor

WAIT = 30
QUESTION = {"sample": "row.jpg", "question": "How many flags are there?"}


def reason_of(client):
    """Why the server is not ready; "" when it is."""
    reply = client.get("/readyz")
    body = reply.json()
    assert (reply.status_code, body["status"]) == ((503, "failed") if "reason" in body else (200, "ready"))
    return body.get("reason", "")


def wait_for_reason(client, says):
    """Until the reason holds some words, or, for "", the server is ready."""
    end = time.monotonic() + WAIT
    while (reason := reason_of(client)) != says and not (says and says in reason):
        assert time.monotonic() < end, reason
        time.sleep(0.05)
    return reason


@contextmanager
def process_of(command, **options):
    """A process that is over at the end of the block, whatever happens in it."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options) as process:
        try:
            yield process
            process.send_signal(signal.SIGTERM)
            assert process.wait(WAIT) in (0, -signal.SIGTERM)
        finally:
            process.kill()


def refused(reply, says):
    assert reply.status_code == 503 and says in reply.json()["error"]["message"], reply.text


# --- engines that are not there, or are no good ---------------------------------------------------


def test_a_server_without_its_engines_is_up_says_why_and_looks_again(toy):  # noqa: F811
    """No engines; then, found without being told, engines that this box may be unable to run; then a torn one."""
    command = [sys.executable, "-m", "gog_edge.serve", "--port", "0", "--threads", "1", "--bundle", str(toy.root),
               "--engine", TENSORRT_RTX]
    out = build(toy, TENSORRT_RTX, sms=(86,))
    aside = out.rename(toy.root / "aside")
    with process_of(command) as process:
        url = next(word for word in process.stdout.readline().split() if word.startswith("http://"))
        with httpx.Client(base_url=url, timeout=WAIT) as client:
            says = f"python -m export.build_engines {toy.root} --engine tensorrt-rtx"
            assert says in reason_of(client) and client.get("/healthz").json() == {"status": "ok"}
            refused(client.post("/v1/ask", json=QUESTION), says)
            refused(client.post("/v1/search", json={"text": "red"}), says)
            refused(client.get("/v1/images/little/0"), says)
            assert client.get("/").status_code == client.get("/v1/samples/row.jpg").status_code == 200
            assert client.get("/v1/models").json()["data"] == []
            assert 'outcome="failed"} 1' in client.get("/metrics").text
            aside.rename(out)
            end = time.monotonic() + WAIT
            while "there are no engines" in (second := reason_of(client)):
                assert time.monotonic() < end
                time.sleep(0.05)
            (out / "image.engine").write_bytes((out / "image.engine").read_bytes()[:1000])
            process.send_signal(signal.SIGHUP)
            assert says in wait_for_reason(client, "has 1000 bytes")
        process.send_signal(signal.SIGTERM)
        said = process.stderr.read().splitlines()
    first, *others = [line for line in said if not line.startswith("gog_edge takes up to")]
    assert first.startswith("gog_edge is not ready: there are no engines")
    assert f"gog_edge is not ready: {second}" in others and len(said) < 6  # told when it changes


def test_a_server_is_ready_as_soon_as_its_engines_are_built(toy, start, cuda_on_processor):  # noqa: F811
    supervisor = supervise(toy.root, 1, EngineChoice(ORT_CUDA))
    own = open_runtime(toy.root, threads=1)
    (answered,) = [event.record.answer for event in own.ask((toy.root / "samples/row.jpg").read_bytes(),
                                                            QUESTION["question"]) if event.kind == "answered"]
    with httpx.Client(base_url=start(supervisor), timeout=WAIT) as client:
        refused(client.post("/v1/ask", json=QUESTION), "there are no engines")
        build(toy)
        supervisor.wake()
        wait_for_reason(client, "")
        reply = client.post("/v1/ask", json=QUESTION)
        assert reply.status_code == 200 and reply.json()["answer"] == answered != ""
        assert client.get("/v1/models").json()["data"][0]["id"] == "atlas"
        assert [pack["name"] for pack in client.get("/readyz").json()["packs"]] == ["little"]
    supervisor.close()
    own.packs.close()


def test_where_only_the_policy_fails_the_search_goes_on(toy, start, cuda_on_processor):  # noqa: F811
    out = build(toy)
    whole = (out / "decoder.onnx").read_bytes()
    write_engine(out, whole[: len(whole) // 2])
    supervisor = supervise(toy.root, 1, EngineChoice(ORT_CUDA))
    with httpx.Client(base_url=start(supervisor), timeout=WAIT) as client:
        assert "decoder.onnx" in reason_of(client)
        refused(client.post("/v1/ask", json=QUESTION), "decoder.onnx")
        found = client.post("/v1/search", json={"sample": "row.jpg"})
        assert found.status_code == 200 and found.json()["results"][0]["evidence"]
        packs = supervisor.runtime.packs
        write_engine(out, whole)
        wait_for_reason(client, "")
        assert client.post("/v1/ask", json=QUESTION).status_code == 200
        assert supervisor.runtime.packs is packs  # what was open stays open
    supervisor.close()


def write_engine(out, data):
    """Put a decoder in the folder of engines, described as the builder would."""
    (out / "decoder.onnx").write_bytes(data)
    manifest = read_json(out / MANIFEST, what="engines")
    paths = [entry["path"] for entry in manifest["files"]]
    write_json(out / MANIFEST, manifest | {"files": [entry.to_json() for entry in describe_files(out, paths)]})


@pytest.mark.parametrize("part", ["policy/vision.onnx", "encoder/text.onnx", "pack/store.sqlite", "bundle.toml"])
def test_a_broken_bundle_ends_the_command(toy, part, capsys):  # noqa: F811
    path = next(toy.root.glob(part), None) or next((toy.root / "pack").rglob("*.sqlite"))
    path.write_bytes(path.read_bytes()[:-9])
    assert main(["--port", "0", "--bundle", str(toy.root), "--engine", TENSORRT_RTX]) == 2
    err = capsys.readouterr().err
    assert path.name in err and err.count("\n") == 1


def test_a_port_in_use_ends_the_command(toy, capsys):  # noqa: F811
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert main(["--port", port, "--bundle", str(toy.root), "--engine", TENSORRT_RTX]) == 2
    assert f"port {port}" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "says"), [(["--engine", "cuda"], "invalid choice: 'cuda'"),
                                             (["--engines", "folder"], "'folder' is a folder of built engines"),
                                             (["--search", "gpu"], "invalid choice: 'gpu'"),
                                             (["--search", "tensorrt"], "invalid choice: 'tensorrt'")])
def test_a_choice_that_there_is_not(words, says, capsys):
    try:
        code = main(["--port", "0", *words])
    except SystemExit as exc:
        code = exc.code
    assert code == 2 and says in capsys.readouterr().err


# --- devices that fail while they are used --------------------------------------------------------


@pytest.fixture
def shelf_of(little_pack_folder, tiny_encoder):
    return lambda: Shelf([little_pack_folder], tiny_encoder)


def test_a_device_that_is_lost_under_a_question_is_given_up_and_opened_again(start, make_runtime, shelf_of):
    error = DeviceLost("GPU 0 is lost")
    mended = threading.Event()

    def mend(runtime):
        if not mended.is_set():
            return replace(runtime, failure=f"still: {error}")
        return replace(runtime, policy=Player(), packs=Still(Flags()), failure="")

    packs = shelf_of()
    supervisor = Supervisor(replace(make_runtime(Player(fault=error)), packs=packs), mend)
    question = {"sample": "three flags.png", "question": "Which?"}
    with httpx.Client(base_url=start(supervisor), timeout=WAIT) as client:
        assert reason_of(client) == ""
        refused(client.post("/v1/ask", json=question), str(error))
        assert str(error) in reason_of(client) and client.get("/v1/models").json()["data"] == []
        refused(client.post("/v1/search", json={"text": "Italy"}), str(error))
        assert supervisor.runtime.packs is None  # and not closed: FAISS would end the process
        with packs.lease():
            pass
        wait_for_reason(client, f"still: {error}")
        mended.set()
        supervisor.wake()
        wait_for_reason(client, "")
        assert client.post("/v1/ask", json=question).status_code == 200
        assert client.post("/v1/search", json={"text": "Italy"}).status_code == 200
    assert supervisor.device_lost
    supervisor.close()


@pytest.mark.parametrize("error", [BackendError("the policy's server is away"),
                                   OutOfDeviceMemory("the GPU's memory is taken")])
def test_a_backend_that_fails_one_question_is_told_and_nothing_is_given_up(start, make_runtime, error):
    runtime = make_runtime(Player(fault=error))
    supervisor = Supervisor(runtime, lambda failed: pytest.fail("nothing lacks"))
    with httpx.Client(base_url=start(supervisor), timeout=WAIT) as client:
        refused(client.post("/v1/ask", json={"sample": "three flags.png", "question": "Which?"}), str(error))
        assert reason_of(client) == "" and supervisor.runtime is runtime and not supervisor.device_lost


def test_a_device_that_is_lost_while_it_is_opened_ends_the_process_after_a_while(toy, monkeypatch):  # noqa: F811
    build(toy)
    opened = []

    def lose(encoder, **options):
        opened.append(encoder)
        raise DeviceLost("GPU 0 is lost to this process")

    monkeypatch.setattr(Encoder, "open", lose)
    monkeypatch.setattr(supervision, "LAST_S", 1.0)
    supervisor = supervise(toy.root, 1, EngineChoice(ORT_CUDA))
    assert supervisor.runtime.lost and "GPU 0 is lost" in supervisor.runtime.failure
    began = time.monotonic()
    with supervisor.watching():
        supervisor.wake()
        while not supervisor.device_lost:
            assert time.monotonic() < began + WAIT
            time.sleep(0.02)
    assert time.monotonic() - began >= 1.0 and len(opened) == 1  # nor was it tried again
    told = supervise(toy.root, 1, EngineChoice(ORT_CUDA))
    with told.watching():
        pass
    assert not told.device_lost  # who is stopped begins not anew
    for each in (supervisor, told):
        each.close()


def test_a_fault_of_ours_at_the_first_try_leaves_the_server_up(toy, monkeypatch, cuda_on_processor):  # noqa: F811
    build(toy)
    with monkeypatch.context() as patched:
        patched.setattr(LocalPolicy, "open", lambda *_, **__: 1 / 0)
        supervisor = supervise(toy.root, 1, EngineChoice(ORT_CUDA))
    assert "ZeroDivisionError" in supervisor.runtime.failure and supervisor.runtime.packs is None
    with supervisor.watching():
        supervisor.wake()
        end = time.monotonic() + WAIT
        while supervisor.runtime.failure:
            assert time.monotonic() < end, supervisor.runtime.failure
            time.sleep(0.02)
    supervisor.close()


def test_a_mend_that_breaks_is_told_and_tried_again(start, make_runtime):
    tries = iter([RuntimeError("a fault of ours"), None])

    def mend(runtime):
        fault = next(tries)
        if fault is not None:
            raise fault
        return replace(whole, failure="")

    whole = make_runtime()
    supervisor = Supervisor(replace(whole, policy=None, failure="not yet"), mend)
    with httpx.Client(base_url=start(supervisor), timeout=WAIT) as client:
        wait_for_reason(client, "a fault of ours")
        wait_for_reason(client, "")


def test_what_is_mended_after_the_server_was_stopped_is_closed(make_runtime, shelf_of):
    packs, opening, stopped = shelf_of(), threading.Event(), threading.Event()

    def mend(runtime):
        opening.set()
        assert stopped.wait(WAIT)
        return replace(make_runtime(), packs=packs)

    supervisor = Supervisor(replace(make_runtime(), policy=None, packs=None, failure="not yet"), mend)
    with supervisor.watching():
        supervisor.wake()
        assert opening.wait(WAIT)
        supervisor.close()
        stopped.set()
    with pytest.raises(PackError, match="closed"), packs.lease():
        pass
    assert supervisor.runtime.policy is None


LIVES = """
import argparse, pathlib
from played import Player, played_runtime
from gog_edge.config import ServeConfig
from gog_edge.errors import DeviceLost
from gog_edge.serve.server import bind, run
from gog_edge.serve.supervisor import Supervisor

parser = argparse.ArgumentParser()
parser.add_argument("folder", type=pathlib.Path)
parser.add_argument("--port", type=int)
folder, port = vars(parser.parse_args()).values()
lived = folder / "lived"
fault = None if lived.exists() else DeviceLost("GPU 0 is lost to this process")
lived.touch()
with bind("127.0.0.1", port) as listener:
    supervisor = Supervisor(played_runtime(folder, Player(fault=fault)), lambda runtime: runtime)
    run(supervisor, listener, ServeConfig(port=port))
"""


def test_a_process_that_lost_its_device_begins_anew(tmp_path, pytestconfig):
    """With the same port, also where it may be any."""
    script = tmp_path / "lives.py"
    script.write_text(LIVES)
    environment = os.environ | {"PYTHONPATH": str(pytestconfig.rootpath / "tests")}
    command = [sys.executable, str(script), str(tmp_path), "--port", "0"]
    question = {"sample": "three flags.png", "question": "Which?"}
    with process_of(command, env=environment) as process:
        first = process.stdout.readline()
        url = next(word for word in first.split() if word.startswith("http://"))
        refused(httpx.post(url + "/v1/ask", json=question, timeout=WAIT), "GPU 0 is lost")
        assert process.stdout.readline() == first  # the same process, another program
        assert httpx.post(url + "/v1/ask", json=question, timeout=WAIT).json()["answer"]


# --- what the choice costs those who do not make it -----------------------------------------------


def test_serving_on_the_processor_loads_no_part_of_another_runtime():
    code = ("import sys; from gog_edge.bundle import DEFAULT_BUNDLE; from gog_edge.engines.registry import EngineChoice; "
            "from gog_edge.serve.server import supervise; supervise(DEFAULT_BUNDLE, 1, EngineChoice()); "
            "print(*sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=WAIT, check=True)
    loaded = set(done.stdout.split())
    assert "gog_edge.engines.onnx.session" in loaded
    assert not {name for name in loaded if name.startswith(("gog_edge.engines.tensorrt", "gog_edge.retrieval.gpu"))}
    assert not {name for name in loaded if name.split(".")[0] in ("cuda", "tensorrt", "tensorrt_rtx_bindings")}
