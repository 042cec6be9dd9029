"""`--search`: packs are searched as chosen, or the server reports why not; GPU resources are released.

The FAISS GPU indexes run on the CPU here, with fp16 vectors.
"""

from dataclasses import replace

import faiss
import httpx
import pytest
from little_world import flag
from test_engine_choice import QUESTION, WAIT, reason_of, refused, wait_for_reason
from typer.testing import CliRunner

from gog_edge.bundle import DEFAULT_BUNDLE
from gog_edge.cli import app
from gog_edge.config import MilvusConfig
from gog_edge.engines.manifest import ORT_CUDA
from gog_edge.engines.registry import CPU_SEARCH, FAISS_GPU, FAISS_GPU_INSTALL, SEARCHES, EngineChoice
from gog_edge.errors import BackendError, DialectError, InputError, NotEnoughMemory, PackError
from gog_edge.files import describe_files, read_json, write_json
from gog_edge.planner import ID_BYTES, plan_memory
from gog_edge.retrieval.manifest import read_manifest
from gog_edge.retrieval.vectors import gpu_index
from gog_edge.retrieval.vectors.gpu_index import TEMP_BYTES, FaissGpu, GpuThread, GpuVectorIndex
from gog_edge.runtime import open_packs, open_runtime
from gog_edge.serve.server import supervise
from gog_edge.types import ImageQuery

LOOK = ImageQuery(flag("Spain"))
ON_FAISS = EngineChoice(search=FAISS_GPU)
no_faiss_gpu = pytest.mark.skipif(hasattr(faiss, "StandardGpuResources"), reason="faiss here uses GPUs")


class Fp16OnCpu(FaissGpu):
    """The GPU resources, with indexes on the CPU."""

    def __init__(self):
        self._thread = GpuThread()

    def flat(self, dim):
        return faiss.index_factory(dim, "SQfp16", faiss.METRIC_INNER_PRODUCT)

    @property
    def closed(self):
        try:
            return self.call(lambda: False)
        except BackendError:
            return True


@pytest.fixture
def gpus(monkeypatch):
    """The GPU resources that were created."""
    made = []

    def make():
        made.append(Fp16OnCpu())
        return made[-1]

    monkeypatch.setattr(gpu_index, "FaissGpu", make)
    return made


# --- choices ------------------------------------------------------------------------


def test_the_indexes_of_the_packs_are_the_default():
    assert EngineChoice().search == CPU_SEARCH and not EngineChoice().on_gpu
    assert ON_FAISS.on_gpu and not ON_FAISS.built and EngineChoice(ORT_CUDA).on_gpu


@pytest.mark.parametrize("name", ["", "gpu", "faiss"])
def test_an_unknown_search_is_refused(name):
    with pytest.raises(InputError, match=f"unknown search '{name}'; must be one of {', '.join(SEARCHES)}"):
        EngineChoice(search=name)


@pytest.mark.parametrize("search", ["tensorrt", "gpu"])
def test_the_command_line_refuses_an_unknown_search(search):
    picture = DEFAULT_BUNDLE / "samples" / "row.jpg"
    done = CliRunner().invoke(app, ["ask", str(picture), "How many?", "--search", search])
    assert done.exit_code and f"unknown search '{search}'" in " ".join(done.output.split())


# --- FAISS ----------------------------------------------------------------------------------------


@no_faiss_gpu
def test_a_server_without_faiss_gpu_is_up_and_reports_what_to_install(toy, start):
    supervisor = supervise(toy.root, 1, ON_FAISS)
    with httpx.Client(base_url=start(supervisor), timeout=WAIT) as client:
        assert f"is built for the CPU; {FAISS_GPU_INSTALL}" in reason_of(client)
        refused(client.post("/v1/ask", json=QUESTION), "is built for the CPU")
        refused(client.post("/v1/search", json={"text": "red"}), "is built for the CPU")
        assert client.get("/healthz").json() == {"status": "ok"}
    supervisor.close()


@no_faiss_gpu
def test_a_question_without_faiss_gpu_is_an_error(capsys):
    picture = DEFAULT_BUNDLE / "samples" / "row.jpg"
    done = CliRunner().invoke(app, ["ask", str(picture), "How many?", "--search", FAISS_GPU])
    assert done.exit_code and "built for the CPU" in " ".join(done.output.split())


@no_faiss_gpu
def test_a_server_is_ready_as_soon_as_faiss_has_a_gpu_and_releases_it(toy, start, request):
    supervisor = supervise(toy.root, 1, ON_FAISS)
    with httpx.Client(base_url=start(supervisor), timeout=WAIT) as client:
        assert "is built for the CPU" in reason_of(client)
        gpus = request.getfixturevalue("gpus")
        supervisor.wake()
        wait_for_reason(client, "")
        with supervisor.runtime.packs.lease() as retriever:
            assert isinstance(retriever.packs["little"].images, GpuVectorIndex)
        assert client.post("/v1/ask", json=QUESTION).status_code == 200
        reply = client.post("/v1/search", json={"sample": "row.jpg"})
        assert reply.json()["results"][0]["evidence"] and [gpu.closed for gpu in gpus] == [False]
    supervisor.close()
    assert [gpu.closed for gpu in gpus] == [True]


def test_a_gpu_is_released_after_the_last_lease(toy, gpus):
    packs = open_packs(toy, threads=1, search=FAISS_GPU)
    with packs.lease() as retriever:
        packs.close()
        assert retriever.search([LOOK])[0].evidence
        assert not gpus[0].closed
    assert gpus[0].closed


OPENERS = {"ask": lambda root: open_runtime(root, threads=1, choice=ON_FAISS),
           "serve": lambda root: supervise(root, 1, ON_FAISS)}  # fmt: skip


@pytest.mark.parametrize("opener", OPENERS)
def test_a_pack_that_fails_to_open_releases_the_gpu(toy, gpus, opener):
    store = next((toy.root / "pack/store").iterdir())
    store.write_bytes(store.read_bytes()[:-9])
    with pytest.raises(PackError, match=store.name):
        OPENERS[opener](toy.root)
    assert [gpu.closed for gpu in gpus] == [True]


@pytest.mark.parametrize("opener", OPENERS)
def test_a_policy_that_fails_to_open_releases_the_gpu(toy, gpus, opener):
    """An unknown dialect schema, which is read after the packs were opened."""
    manifest = read_json(toy.policy / "manifest.json", what="policy")
    (toy.policy / "dialect.toml").write_text("schema = 99\n")
    files = describe_files(toy.policy, [entry["path"] for entry in manifest["files"]])
    write_json(toy.policy / "manifest.json", manifest | {"files": [entry.to_json() for entry in files]})
    with pytest.raises(DialectError):
        OPENERS[opener](toy.root)
    assert [gpu.closed for gpu in gpus] == [True]


# --- memory -----------------------------------------------------------------------------------


def test_vectors_are_planned_on_the_gpu_and_ids_on_the_host(toy):
    plan, own = plan_memory(toy, search=FAISS_GPU), plan_memory(toy)
    manifest = read_manifest(toy.packs[0])
    rows = [space.rows for space in (manifest.images, manifest.captions)]
    assert plan.vectors == TEMP_BYTES + 2 * sum(gpu_index.vectors_bytes(count, manifest.encoder.dim) for count in rows)
    assert plan.switch == sum(rows) * ID_BYTES and own.index - plan.index == own.switch - plan.switch > 0
    assert plan.weights == own.weights and plan.device == plan.vectors and own.device == 0
    assert "vectors" in str(plan) and "vectors" not in str(own)
    shared = plan_memory(toy, search=FAISS_GPU, integrated=True)
    assert shared.device == 0 and shared.total == plan.total


def test_packs_in_milvus_need_no_gpu_memory(toy):
    served = replace(toy, servers={toy.packs[0]: MilvusConfig("http://127.0.0.1:9")})
    assert plan_memory(served, search=FAISS_GPU).vectors == TEMP_BYTES


def test_a_gpu_that_is_too_small_for_the_vectors_is_an_error(toy):
    with pytest.raises(NotEnoughMemory, match="1 MiB are free on the GPU: remove a pack, or search on the CPU"):
        plan_memory(toy, search=FAISS_GPU).check(2**40, 2**20)
