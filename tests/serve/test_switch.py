"""A served pack is changed by other processes many times: no request fails, and no answer mixes generations."""

import base64
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import httpx
import pytest
from little_folder import write_flag, write_little_folder
from little_world import FLAGS, flag, png
from playback import PlaybackPolicy

from gog_edge.bundle import DEFAULT_BUNDLE
from gog_edge.config import Limits
from gog_edge.indexing.build import build_pack
from gog_edge.indexing.sources.open import open_source
from gog_edge.indexing.tombstones import remove
from gog_edge.retrieval.manifest import MANIFEST, read_manifest
from gog_edge.retrieval.registry import PackRegistry
from gog_edge.runtime import Runtime
from gog_edge.types import Answer, ImageSearch, TextSearch

EDITIONS = 8
# Runs `gog-edge` with the arguments of each line, and prints a line when it is done.
COMMANDS = """
import shlex, sys
from gog_edge.cli import app
for line in sys.stdin:
    app(shlex.split(line), standalone_mode=False)
    print("done", flush=True)
"""
# An episode with an image and a text search, and enough time for a switch of generations between them.
SCRIPT = (
    ("I look at the whole picture, slowly and with many words. <img_search>", ImageSearch()),
    ("Now I read the news of Spain, also slowly and with many words. <text_search>", TextSearch("Spain news")),
    ("That is Spain.", Answer("Spain")),
)


@pytest.fixture
def folder(tmp_path, tiny_encoder):
    source = write_little_folder(tmp_path / "source")
    write_flag(source, "Spain", "Spain has news: edition 0.")
    build_pack(open_source(source), tmp_path / "pack", name="little", encoder=tiny_encoder, workers=1)
    return tmp_path / "pack"


@pytest.fixture
def url(start, folder, tiny_encoder):
    """A server that checks the manifest every few milliseconds."""
    packs = PackRegistry([folder], tiny_encoder)
    runtime = Runtime("little", PlaybackPolicy(SCRIPT, pause_s=0.01), packs, Limits(concurrent=4))
    with packs.watch(interval_s=0.01):
        yield start(runtime, waiting=8)
    packs.close()


def editions(results):
    """The edition numbers in the evidence about Spain."""
    passages = [passage for result in results for evidence in result["evidence"] for passage in evidence["passages"]]
    return {int(number) for passage in passages for number in re.findall(r"edition (\d+)", passage["text"])}


class Client(threading.Thread):
    """Sends the same request again and again, and records the results."""

    def __init__(self, url, stopped, ask):
        super().__init__()
        self.url, self.stopped, self.ask = url, stopped, ask
        self.seen, self.requests, self.faults = set(), 0, []

    def run(self):
        with httpx.Client(base_url=self.url, timeout=60) as client:
            while not self.stopped.is_set() and not self.faults:
                try:
                    found = self.ask(client)
                    assert len(found) == 1, f"of {len(found)} generations: {found}"
                    self.seen |= found
                    self.requests += 1
                except Exception as exc:
                    self.faults.append(exc)


def search(client):
    picture = base64.b64encode(png(flag("Spain"))).decode()
    queries = [{"picture": picture, "question": "What are the news of Spain?"}, {"text": "Spain news edition"}]
    reply = client.post("/v1/search", json={"queries": queries})
    assert reply.status_code == 200, reply.text
    results = reply.json()["results"]
    image = results[0]["evidence"][0]["image"]
    assert client.get(f"/v1/images/{image['pack']}/{image['image']}").status_code == 200
    assert all(editions([result]) for result in results)
    return editions(results)


def ask(client):
    picture = base64.b64encode(png(flag("Spain"))).decode()
    reply = client.post("/v1/ask", json={"picture": picture, "question": "What are the news of Spain?"})
    assert reply.status_code == 200, reply.text
    body = reply.json()
    looked, read, _ = body["steps"]
    assert editions([looked]) and editions([read])
    assert all("edition" in citation["text"] or "Spain" in citation["text"] for citation in body["citations"])
    return editions([looked, read])


def wait_for(client, generation):
    end = time.monotonic() + 30
    while (state := client.get("/readyz").json()["packs"][0])["generation"] != generation:
        assert time.monotonic() < end and not state["refused"], state
        time.sleep(0.01)


def test_no_request_fails_while_a_pack_is_changed(url, folder, tmp_path, tiny_encoder_folder):
    stopped = threading.Event()
    clients = [Client(url, stopped, what) for what in (search, ask, search, ask)]
    with subprocess.Popen([sys.executable, "-c", COMMANDS], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as process, httpx.Client(base_url=url, timeout=60) as client:

        def run(command):
            process.stdin.write(command + "\n")
            process.stdin.flush()
            assert any(line == "done\n" for line in process.stdout), command

        for client_thread in clients:
            client_thread.start()
        others = [name for name in FLAGS if name != "Spain"]
        for edition in range(1, EDITIONS + 1):
            write_flag(tmp_path / f"news{edition}", "Spain", f"Spain has news: edition {edition}.")
            run(f"pack add {folder} {tmp_path / f'news{edition}'} --encoder {tiny_encoder_folder} --workers 1")
            if edition % 2:
                run(f"pack remove {folder} --article '{others.pop()}.png'")
            if edition % 3 == 0:
                run(f"pack compact {folder} --encoder {tiny_encoder_folder}")
            if edition % 4 == 0:  # only some generations are waited for; others may be skipped
                wait_for(client, read_manifest(folder).generation)
        generation = read_manifest(folder).generation
        wait_for(client, generation)
        time.sleep(1.0)
        stopped.set()
        for client_thread in clients:
            client_thread.join()
        process.stdin.close()
        metrics = client.get("/metrics").text
    assert [fault for client_thread in clients for fault in client_thread.faults] == []
    assert generation == 1 + EDITIONS + EDITIONS // 2 + EDITIONS // 3
    assert all(client_thread.requests >= 5 and EDITIONS in client_thread.seen for client_thread in clients)
    assert len(set.union(*(client_thread.seen for client_thread in clients))) >= 4
    assert f'gog_edge_pack_generation{{pack="little"}} {generation}' in metrics
    assert 'gog_edge_pack_refusals_total{pack="little"} 0' in metrics
    assert int(re.search(r'gog_edge_pack_switches_total{pack="little"} (\d+)', metrics)[1]) >= 3


def test_a_damaged_generation_is_reported_and_the_old_one_is_served(url, folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    path = other / remove(other, articles=["Italy"]).tombstones.images
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    shutil.copytree(other / "tombstones", folder / "tombstones")
    (other / MANIFEST).replace(folder / MANIFEST)
    with httpx.Client(base_url=url, timeout=60) as client:
        end = time.monotonic() + 20
        while not (state := client.get("/readyz").json()["packs"][0])["refused"]:
            assert time.monotonic() < end
            time.sleep(0.01)
        assert state["generation"] == 1 and "is altered" in state["refused"]
        assert 'gog_edge_pack_refusals_total{pack="little"} 1' in client.get("/metrics").text
        assert client.get("/readyz").status_code == 200
        assert search(client) == {0}


def test_a_signal_makes_a_server_check_at_once(folder, tmp_path, tiny_encoder_folder):
    """`python -m gog_edge.serve` of a bundle whose pack is changed by `gog-edge pack`."""
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_encoder_folder, bundle / "encoder")
    shutil.copytree(DEFAULT_BUNDLE / "policy", bundle / "policy")
    pack = shutil.copytree(folder, bundle / "pack")
    (bundle / "bundle.toml").write_text(
        'schema = 1\nname = "toy"\n[policy]\npath = "policy"\n[encoder]\npath = "encoder"\n[[packs]]\npath = "pack"\n')
    command = [sys.executable, "-m", "gog_edge.serve", "--port", "0", "--threads", "1", "--bundle", str(bundle)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        url = next(word for word in process.stdout.readline().split() if word.startswith("http://"))
        with httpx.Client(base_url=url, timeout=60) as client:
            assert search(client) == {0}
            subprocess.run([sys.executable, "-m", "gog_edge.cli", "pack", "remove", str(pack), "--article", "Spain"],
                           check=True, timeout=60, stdout=subprocess.DEVNULL)
            process.send_signal(signal.SIGHUP)
            wait_for(client, 2)
            reply = client.post("/v1/search", json={"text": "Spain news edition"}).json()
            assert editions(reply["results"]) == set()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) in (0, -signal.SIGTERM)
        assert len(process.stderr.read().splitlines()) == 1  # the memory plan
