"""Engines that are not available or are lost: the server stays up, reports why, and is ready once they are."""

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
from playback import FixedPacks, FlagRetriever, PlaybackPolicy
from toy_bundle import build

from gog_edge.engines.manifest import MANIFEST, ORT_CUDA, TENSORRT_RTX
from gog_edge.engines.registry import EngineChoice
from gog_edge.errors import BackendError, DeviceLost, OutOfDeviceMemory, PackError
from gog_edge.files import describe_files, read_json, write_json
from gog_edge.policy.local import LocalPolicy
from gog_edge.retrieval.encoder import Encoder
from gog_edge.retrieval.registry import PackRegistry
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


def wait_for_reason(client, words):
    """Wait until the reason contains some words or, for "", until the server is ready."""
    end = time.monotonic() + WAIT
    while (reason := reason_of(client)) != words and not (words and words in reason):
        assert time.monotonic() < end, reason
        time.sleep(0.05)
    return reason


@contextmanager
def process_of(command, **options):
    """A process that is stopped at the end of the block."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options) as process:
        try:
            yield process
            process.send_signal(signal.SIGTERM)
            assert process.wait(WAIT) in (0, -signal.SIGTERM)
        finally:
            process.kill()


def exit_code(*arguments):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    return exit.value.code


def refused(reply, words):
    assert reply.status_code == 503 and words in reply.json()["error"]["message"], reply.text


# --- engines that are missing or damaged ---------------------------------------------------


def test_a_server_without_its_engines_reports_why_and_retries(toy):
    """No engines; then engines that may not run on this machine; then a truncated one."""
    command = [sys.executable, "-m", "gog_edge.serve", "--port", "0", "--threads", "1", "--bundle", str(toy.root),
               "--engine", TENSORRT_RTX]
    out = build(toy, TENSORRT_RTX, sms=(86,))
    aside = out.rename(toy.root / "aside")
    with process_of(command) as process:
        url = next(word for word in process.stdout.readline().split() if word.startswith("http://"))
        with httpx.Client(base_url=url, timeout=WAIT) as client:
            hint = f"gog-edge export engines {toy.root} --engine tensorrt-rtx"
            assert hint in reason_of(client) and client.get("/healthz").json() == {"status": "ok"}
            refused(client.post("/v1/ask", json=QUESTION), hint)
            refused(client.post("/v1/search", json={"text": "red"}), hint)
            refused(client.get("/v1/images/little/0"), hint)
            assert client.get("/").status_code == client.get("/v1/samples/row.jpg").status_code == 200
            assert client.get("/v1/models").json()["data"] == []
            assert 'outcome="failed"} 1' in client.get("/metrics").text
            aside.rename(out)
            end = time.monotonic() + WAIT
            while "no engines in" in (second := reason_of(client)):
                assert time.monotonic() < end
                time.sleep(0.05)
            (out / "image.engine").write_bytes((out / "image.engine").read_bytes()[:1000])
            process.send_signal(signal.SIGHUP)
            assert hint in wait_for_reason(client, "has 1000 bytes")
        process.send_signal(signal.SIGTERM)
        log = process.stderr.read().splitlines()
    first, *others = [line for line in log if not line.startswith("gog_edge takes up to")]
    assert first.startswith("gog_edge is not ready: no engines in")
    assert f"gog_edge is not ready: {second}" in others and len(log) < 6  # only changes are logged


def test_a_server_is_ready_as_soon_as_its_engines_are_built(toy, start, cuda_on_cpu):
    supervisor = supervise(toy.root, 1, EngineChoice(ORT_CUDA))
    own = open_runtime(toy.root, threads=1)
    picture = (toy.root / "samples/row.jpg").read_bytes()
    expected = own.answer(picture, QUESTION["question"], lambda event: None).answer
    with httpx.Client(base_url=start(supervisor), timeout=WAIT) as client:
        refused(client.post("/v1/ask", json=QUESTION), "no engines in")
        build(toy)
        supervisor.wake()
        wait_for_reason(client, "")
        reply = client.post("/v1/ask", json=QUESTION)
        assert reply.status_code == 200 and reply.json()["answer"] == expected != ""
        assert client.get("/v1/models").json()["data"][0]["id"] == "atlas"
        assert [pack["name"] for pack in client.get("/readyz").json()["packs"]] == ["little"]
    supervisor.close()
    own.packs.close()


def test_search_is_available_when_only_the_policy_fails(toy, start, cuda_on_cpu):
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
    """Write a decoder to the folder of engines, with its entry in the manifest."""
    (out / "decoder.onnx").write_bytes(data)
    manifest = read_json(out / MANIFEST, what="engines")
    paths = [entry["path"] for entry in manifest["files"]]
    write_json(out / MANIFEST, manifest | {"files": [entry.to_json() for entry in describe_files(out, paths)]})


@pytest.mark.parametrize("part", ["policy/vision.onnx", "encoder/text.onnx", "pack/store.sqlite", "bundle.toml"])
def test_a_damaged_bundle_ends_the_command(toy, part, capsys):
    path = next(toy.root.glob(part), None) or next((toy.root / "pack").rglob("*.sqlite"))
    path.write_bytes(path.read_bytes()[:-9])
    assert exit_code("--port", "0", "--bundle", str(toy.root), "--engine", TENSORRT_RTX) == 1
    err = capsys.readouterr().err
    assert path.name in err and err.count("\n") == 1


def test_a_port_in_use_ends_the_command(toy, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert exit_code("--port", port, "--bundle", str(toy.root), "--engine", TENSORRT_RTX) == 1
    assert f"port {port}" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "message"), [(["--engine", "cuda"], "unknown engine 'cuda'"),
                                                (["--engines", "folder"], "'folder' is a folder of built engines"),
                                                (["--search", "gpu"], "'gpu'"),
                                                (["--search", "tensorrt"], "'tensorrt'")])
def test_unknown_engines_and_searches_are_refused(words, message, capsys):
    assert exit_code("--port", "0", *words) == 2 and message in capsys.readouterr().err


# --- devices that fail while they are used --------------------------------------------------------


@pytest.fixture
def make_packs(little_pack_folder, tiny_encoder):
    return lambda: PackRegistry([little_pack_folder], tiny_encoder)


def test_a_device_that_is_lost_during_a_question_is_given_up_and_opened_again(start, make_runtime, make_packs):
    error = DeviceLost("GPU 0 is lost")
    repaired = threading.Event()

    def repair(runtime):
        if not repaired.is_set():
            return replace(runtime, failure=f"still: {error}")
        return replace(runtime, policy=PlaybackPolicy(), packs=FixedPacks(FlagRetriever()), failure="")

    packs = make_packs()
    supervisor = Supervisor(replace(make_runtime(PlaybackPolicy(fault=error)), packs=packs), repair)
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
        repaired.set()
        supervisor.wake()
        wait_for_reason(client, "")
        assert client.post("/v1/ask", json=question).status_code == 200
        assert client.post("/v1/search", json={"text": "Italy"}).status_code == 200
    assert supervisor.device_lost
    supervisor.close()


@pytest.mark.parametrize("error", [BackendError("the policy's server is away"),
                                   OutOfDeviceMemory("the GPU's memory is taken")])
def test_an_error_of_the_backend_fails_one_question_only(start, make_runtime, error):
    runtime = make_runtime(PlaybackPolicy(fault=error))
    supervisor = Supervisor(runtime, lambda failed: pytest.fail("no part is missing"))
    with httpx.Client(base_url=start(supervisor), timeout=WAIT) as client:
        refused(client.post("/v1/ask", json={"sample": "three flags.png", "question": "Which?"}), str(error))
        assert reason_of(client) == "" and supervisor.runtime is runtime and not supervisor.device_lost


def test_a_device_that_is_lost_while_opening_ends_the_process_after_a_delay(toy, monkeypatch):
    build(toy)
    opened = []

    def lose(encoder, **options):
        opened.append(encoder)
        raise DeviceLost("GPU 0 is lost to this process")

    monkeypatch.setattr(Encoder, "open", lose)
    monkeypatch.setattr(supervision, "MAX_RETRY_S", 1.0)
    supervisor = supervise(toy.root, 1, EngineChoice(ORT_CUDA))
    assert supervisor.runtime.lost and "GPU 0 is lost" in supervisor.runtime.failure
    began = time.monotonic()
    with supervisor.watch():
        supervisor.wake()
        while not supervisor.device_lost:
            assert time.monotonic() < began + WAIT
            time.sleep(0.02)
    assert time.monotonic() - began >= 1.0 and len(opened) == 1  # it was not retried
    stopped = supervise(toy.root, 1, EngineChoice(ORT_CUDA))
    with stopped.watch():
        pass
    assert not stopped.device_lost  # a server that is stopped is not started again
    for each in (supervisor, stopped):
        each.close()


def test_an_internal_error_at_the_first_attempt_leaves_the_server_up(toy, monkeypatch, cuda_on_cpu):
    build(toy)
    with monkeypatch.context() as patched:
        patched.setattr(LocalPolicy, "open", lambda *_, **__: 1 / 0)
        supervisor = supervise(toy.root, 1, EngineChoice(ORT_CUDA))
    assert "ZeroDivisionError" in supervisor.runtime.failure and supervisor.runtime.packs is None
    with supervisor.watch():
        supervisor.wake()
        end = time.monotonic() + WAIT
        while supervisor.runtime.failure:
            assert time.monotonic() < end, supervisor.runtime.failure
            time.sleep(0.02)
    supervisor.close()


def test_a_failed_repair_is_reported_and_retried(start, make_runtime):
    tries = iter([RuntimeError("an internal error"), None])

    def repair(runtime):
        fault = next(tries)
        if fault is not None:
            raise fault
        return replace(whole, failure="")

    whole = make_runtime()
    supervisor = Supervisor(replace(whole, policy=None, failure="not yet"), repair)
    with httpx.Client(base_url=start(supervisor), timeout=WAIT) as client:
        wait_for_reason(client, "an internal error")
        wait_for_reason(client, "")


def test_packs_that_open_after_the_server_was_stopped_are_closed(make_runtime, make_packs):
    packs, opening, stopped = make_packs(), threading.Event(), threading.Event()

    def repair(runtime):
        opening.set()
        assert stopped.wait(WAIT)
        return replace(make_runtime(), packs=packs)

    supervisor = Supervisor(replace(make_runtime(), policy=None, packs=None, failure="not yet"), repair)
    with supervisor.watch():
        supervisor.wake()
        assert opening.wait(WAIT)
        supervisor.close()
        stopped.set()
    with pytest.raises(PackError, match="closed"), packs.lease():
        pass
    assert supervisor.runtime.policy is None


RESTARTING = """
import argparse, pathlib
from playback import PlaybackPolicy, playback_runtime
from gog_edge.config import ServeConfig
from gog_edge.errors import DeviceLost
from gog_edge.serve.server import bind, run
from gog_edge.serve.supervisor import Supervisor

parser = argparse.ArgumentParser()
parser.add_argument("folder", type=pathlib.Path)
parser.add_argument("--port", type=int)
folder, port = vars(parser.parse_args()).values()
restarted = folder / "restarted"
fault = None if restarted.exists() else DeviceLost("GPU 0 is lost to this process")
restarted.touch()
with bind("127.0.0.1", port) as listener:
    supervisor = Supervisor(playback_runtime(folder, PlaybackPolicy(fault=fault)), lambda runtime: runtime)
    run(supervisor, listener, ServeConfig(port=port))
"""


def test_a_process_that_lost_its_device_is_restarted_on_the_same_port(tmp_path, pytestconfig):
    script = tmp_path / "restarting.py"
    script.write_text(RESTARTING)
    environment = os.environ | {"PYTHONPATH": str(pytestconfig.rootpath / "tests")}
    command = [sys.executable, str(script), str(tmp_path), "--port", "0"]
    question = {"sample": "three flags.png", "question": "Which?"}
    with process_of(command, env=environment) as process:
        first = process.stdout.readline()
        url = next(word for word in first.split() if word.startswith("http://"))
        refused(httpx.post(url + "/v1/ask", json=question, timeout=WAIT), "GPU 0 is lost")
        assert process.stdout.readline() == first  # the same process, another program
        assert httpx.post(url + "/v1/ask", json=question, timeout=WAIT).json()["answer"]


# --- the default engine -----------------------------------------------


def test_serving_on_the_cpu_loads_no_other_engine():
    code = ("import sys; from gog_edge.bundle import DEFAULT_BUNDLE; "
            "from gog_edge.engines.registry import EngineChoice; "
            "from gog_edge.serve.server import supervise; supervise(DEFAULT_BUNDLE, 1, EngineChoice()); "
            "print(*sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=WAIT, check=True)
    loaded = set(done.stdout.split())
    assert "gog_edge.engines.onnx.session" in loaded
    others = ("gog_edge.engines.tensorrt", "gog_edge.retrieval.vectors.gpu_index")
    assert not {name for name in loaded if name.startswith(others)}
    assert not {name for name in loaded if name.split(".")[0] in ("cuda", "tensorrt", "tensorrt_rtx_bindings")}
