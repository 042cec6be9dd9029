"""`--search`: what searches the packs is had as it was asked for, or the server says why not; a GPU gets all back.

TensorRT's search runs on a GPU in the host's memory (`host_gpu`), FAISS's on FAISS's own halves of the CPU.
"""

from dataclasses import replace

import faiss
import httpx
import pytest
from built_engines import toy  # noqa: F401
from little_world import flag
from test_engine_choice import QUESTION, WAIT, reason_of, refused, wait_for_reason
from trt_world import host_gpu, write_engines  # noqa: F401
from typer.testing import CliRunner

from gog_edge.bundle import DEFAULT_BUNDLE
from gog_edge.cli import app
from gog_edge.config import MilvusConfig
from gog_edge.engines.built import FOLDER, ORT, ORT_CUDA, SEARCH, TENSORRT, TENSORRT_RTX
from gog_edge.engines.choice import CPU_SEARCH, FAISS_GPU, FAISS_GPU_INSTALL, SEARCHES, EngineChoice
from gog_edge.errors import BackendError, DialectError, InputError, NotEnoughMemory, OutOfDeviceMemory, PackError
from gog_edge.files import describe_files, read_json, write_json
from gog_edge.indexing.changes import remove
from gog_edge.planner import ID_BYTES, plan_memory
from gog_edge.retrieval import gpu_index, gpu_search
from gog_edge.retrieval.gpu_index import TEMP_BYTES, Gpu, GpuVectorIndex, OneThread
from gog_edge.retrieval.gpu_search import TrtVectorIndex
from gog_edge.retrieval.manifest import read_manifest
from gog_edge.runtime import open_packs, open_runtime
from gog_edge.serve.server import supervise
from gog_edge.types import ImageQuery

LOOK = ImageQuery(flag("Spain"))
ON_FAISS, ON_TENSORRT = EngineChoice(search=FAISS_GPU), EngineChoice(TENSORRT_RTX, search=TENSORRT)
no_faiss_gpu = pytest.mark.skipif(hasattr(faiss, "StandardGpuResources"), reason="faiss here uses GPUs")


class HalvesOnCpu(Gpu):
    """All of it but the GPU."""

    def __init__(self):
        self._owner = OneThread()

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
    """The GPUs that FAISS was asked for, each with its one thread."""
    made = []

    def make():
        made.append(HalvesOnCpu())
        return made[-1]

    monkeypatch.setattr(gpu_index, "Gpu", make)
    return made


@pytest.fixture
def engines(toy, host_gpu):  # noqa: F811
    """The toy's engines for TensorRT, the search among them; read, not opened."""
    write_engines(toy, toy.root / FOLDER / TENSORRT_RTX)
    return ON_TENSORRT.read(toy.root)


def found(packs):
    with packs.lease() as library:
        (result,) = library.search([LOOK])
        return [(evidence.titles, round(evidence.score, 5)) for evidence in result.evidence]


# --- what may be asked for ------------------------------------------------------------------------


def test_packs_own_indexes_are_the_default():
    assert EngineChoice().search == CPU_SEARCH and not EngineChoice().on_gpu
    assert ON_FAISS.on_gpu and not ON_FAISS.built and EngineChoice(ORT_CUDA).on_gpu


@pytest.mark.parametrize("name", ["", "gpu", "faiss"])
def test_a_search_that_there_is_not_is_refused_with_those_that_there_are(name):
    with pytest.raises(InputError, match=f"no search '{name}'; known are {', '.join(SEARCHES)}"):
        EngineChoice(search=name)


@pytest.mark.parametrize("engine", [ORT, ORT_CUDA])
def test_tensorrt_searches_beside_its_own_engines_alone(engine):
    with pytest.raises(InputError, match=f"tensorrt or tensorrt-rtx, asked for is '{engine}'.*'{FAISS_GPU}'"):
        EngineChoice(engine, search=TENSORRT)


@pytest.mark.parametrize(("search", "says"), [(TENSORRT, "asked for is 'ort'"), ("gpu", "no search 'gpu'")])
def test_a_question_refuses_what_cannot_be(search, says):
    picture = DEFAULT_BUNDLE / "samples" / "row.jpg"
    done = CliRunner().invoke(app, ["ask", str(picture), "How many?", "--search", search])
    assert done.exit_code and says in " ".join(done.output.split())


# --- FAISS ----------------------------------------------------------------------------------------


@no_faiss_gpu
def test_a_server_without_faiss_for_gpus_is_up_and_says_what_to_do(toy, start):  # noqa: F811
    supervisor = supervise(toy.root, 1, ON_FAISS)
    with httpx.Client(base_url=start(supervisor), timeout=WAIT) as client:
        assert f"is built for the CPU; {FAISS_GPU_INSTALL}" in reason_of(client)
        refused(client.post("/v1/ask", json=QUESTION), "is built for the CPU")
        refused(client.post("/v1/search", json={"text": "red"}), "is built for the CPU")
        assert client.get("/healthz").json() == {"status": "ok"}
    supervisor.close()


@no_faiss_gpu
def test_a_question_without_faiss_for_gpus_is_told_so(capsys):
    picture = DEFAULT_BUNDLE / "samples" / "row.jpg"
    done = CliRunner().invoke(app, ["ask", str(picture), "How many?", "--search", FAISS_GPU])
    assert done.exit_code and "built for the CPU" in " ".join(done.output.split())


@no_faiss_gpu
def test_a_server_is_ready_as_soon_as_faiss_has_its_gpu_and_gives_it_back(toy, start, request):  # noqa: F811
    supervisor = supervise(toy.root, 1, ON_FAISS)
    with httpx.Client(base_url=start(supervisor), timeout=WAIT) as client:
        assert "is built for the CPU" in reason_of(client)
        gpus = request.getfixturevalue("gpus")
        supervisor.wake()
        wait_for_reason(client, "")
        with supervisor.runtime.packs.lease() as library:
            assert isinstance(library.packs["little"].images, GpuVectorIndex)
        assert client.post("/v1/ask", json=QUESTION).status_code == 200
        reply = client.post("/v1/search", json={"sample": "row.jpg"})
        assert reply.json()["results"][0]["evidence"] and [gpu.closed for gpu in gpus] == [False]
    supervisor.close()
    assert [gpu.closed for gpu in gpus] == [True]


def test_a_gpu_is_kept_until_the_last_lease_ends(toy, gpus):  # noqa: F811
    packs = open_packs(toy, threads=1, search=FAISS_GPU)
    with packs.lease() as library:
        packs.close()
        assert library.search([LOOK])[0].evidence
        assert not gpus[0].closed
    assert gpus[0].closed


OPENERS = {"ask": lambda root: open_runtime(root, threads=1, choice=ON_FAISS),
           "serve": lambda root: supervise(root, 1, ON_FAISS)}  # fmt: skip


@pytest.mark.parametrize("opener", OPENERS)
def test_a_pack_that_does_not_open_gives_the_gpu_back(toy, gpus, opener):  # noqa: F811
    store = next((toy.root / "pack/store").iterdir())
    store.write_bytes(store.read_bytes()[:-9])
    with pytest.raises(PackError, match=store.name):
        OPENERS[opener](toy.root)
    assert [gpu.closed for gpu in gpus] == [True]


@pytest.mark.parametrize("opener", OPENERS)
def test_a_policy_that_does_not_open_gives_the_gpu_back(toy, gpus, opener):  # noqa: F811
    """A dialect of no known kind, which is read when the packs are open."""
    manifest = read_json(toy.policy / "manifest.json", what="policy")
    (toy.policy / "dialect.toml").write_text("schema = 99\n")
    files = describe_files(toy.policy, [entry["path"] for entry in manifest["files"]])
    write_json(toy.policy / "manifest.json", manifest | {"files": [entry.to_json() for entry in files]})
    with pytest.raises(DialectError):
        OPENERS[opener](toy.root)
    assert [gpu.closed for gpu in gpus] == [True]


# --- TensorRT -------------------------------------------------------------------------------------


def test_engines_without_the_search_are_told_with_the_command(toy, host_gpu, start):  # noqa: F811
    folder = write_engines(toy, toy.root / FOLDER / TENSORRT_RTX, search=False)
    supervisor = supervise(toy.root, 1, ON_TENSORRT)
    with httpx.Client(base_url=start(supervisor), timeout=WAIT) as client:
        said = reason_of(client)
        command = f"python -m export.build_engines {toy.root} --engine {TENSORRT_RTX}"
        assert f"none for '{SEARCH}'; build them again: {command}" in said and said.count("build") == 2
        refused(client.post("/v1/ask", json=QUESTION), command)
        write_engines(toy, folder)
        supervisor.wake()
        wait_for_reason(client, "")
        assert client.post("/v1/ask", json=QUESTION).status_code == 200
    supervisor.close()


def test_tensorrt_finds_what_the_packs_own_indexes_find(toy, engines):  # noqa: F811
    own = open_packs(toy, threads=1, engines=engines)
    on_gpu = open_packs(toy, threads=1, engines=engines, search=TENSORRT)
    with on_gpu.lease() as library:
        assert isinstance(library.packs["little"].images, TrtVectorIndex)
        assert isinstance(library.packs["little"].captions, TrtVectorIndex)
    assert found(on_gpu) == found(own) != []
    own.close()
    on_gpu.close()


def test_two_generations_lie_on_the_gpu_only_while_both_are_used(toy, engines, host_gpu):  # noqa: F811
    packs = open_packs(toy, threads=1, engines=engines, search=TENSORRT)
    found(packs)  # what a search takes beside the vectors is taken
    alone, taken = host_gpu.held, vectors_of(toy.packs[0])
    with packs.lease() as library:
        remove(toy.packs[0], articles=["Norway"])
        packs.refresh()
        assert packs.states()[0].generation == 2 and host_gpu.held == alone + taken
        assert library.search([LOOK])[0].evidence
    assert host_gpu.held == alone
    packs.close()
    assert host_gpu.held == alone - taken


def vectors_of(pack):
    manifest = read_manifest(pack)
    spaces = manifest.images, manifest.captions
    return sum(gpu_search.vectors_bytes(space.rows, manifest.encoder.dim) for space in spaces)


def test_no_room_for_a_new_generation_leaves_the_old_one_served(toy, engines, host_gpu):  # noqa: F811
    packs = open_packs(toy, threads=1, engines=engines, search=TENSORRT)
    before, host_gpu.total = found(packs), host_gpu.held + 100
    held = host_gpu.held
    remove(toy.packs[0], articles=["Norway"])
    packs.refresh()
    (state,) = packs.states()
    assert state.generation == 1 and "memory is taken" in state.refused
    assert host_gpu.held == held and found(packs) == before
    packs.close()


def test_no_room_at_all_gives_everything_back(toy, engines, host_gpu, monkeypatch):  # noqa: F811
    def without_room(graph, shards):
        host_gpu.total = host_gpu.held + 100
        return filled(graph, shards)

    filled = gpu_search.TrtPart.filled
    monkeypatch.setattr(gpu_search.TrtPart, "filled", without_room)
    with pytest.raises(OutOfDeviceMemory):
        open_packs(toy, threads=1, engines=engines, search=TENSORRT)
    assert host_gpu.held == 0


# --- the memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("choice", "scratch", "taken"), [
    (ON_FAISS, TEMP_BYTES, gpu_index.vectors_bytes), (ON_TENSORRT, gpu_search.SCRATCH_BYTES, gpu_search.vectors_bytes),
])  # fmt: skip
def test_vectors_are_planned_on_the_gpu_and_ids_on_the_host(engines, toy, choice, scratch, taken):  # noqa: F811
    read = choice.read(toy.root)
    plan, own = plan_memory(toy, read, search=choice.search), plan_memory(toy, read)
    manifest = read_manifest(toy.packs[0])
    rows = [space.rows for space in (manifest.images, manifest.captions)]
    assert plan.vectors == scratch + 2 * sum(taken(count, manifest.encoder.dim) for count in rows)
    assert plan.switch == sum(rows) * ID_BYTES and own.index - plan.index == own.switch - plan.switch > 0
    assert plan.weights - own.weights == (0 if read is None else read.bytes((SEARCH,)))
    assert plan.device == plan.vectors + (plan.weights - own.weights) + own.device
    assert "vectors" in str(plan) and "vectors" not in str(own)
    shared = plan_memory(toy, read, search=choice.search, integrated=True)
    assert shared.device == 0 and shared.total == plan.total


def test_packs_that_a_server_searches_take_no_gpu(toy):  # noqa: F811
    served = replace(toy, servers={toy.packs[0]: MilvusConfig("http://127.0.0.1:9")})
    assert plan_memory(served, search=FAISS_GPU).vectors == TEMP_BYTES


def test_a_gpu_too_small_for_the_vectors_is_told(toy):  # noqa: F811
    with pytest.raises(NotEnoughMemory, match="1 MiB are free on the GPU: leave out a pack, or search it on the CPU"):
        plan_memory(toy, search=FAISS_GPU).check(2**40, 2**20)
