"""`gog-edge doctor --search`, and the build commands that the doctor recommends."""

import json
import shlex
import shutil

import pytest
from sample_machines import CPU, CUDA, JETPACK_7, NO_DRIVER, ORIN, RTX, orin_nano, pc, sample_machine
from test_doctor_examine import finding, write_atlas_engines
from toy_bundle import build
from typer.testing import CliRunner

from gog_edge.bundle import DEFAULT_BUNDLE, open_bundle
from gog_edge.cli import app
from gog_edge.doctor.examine import examine
from gog_edge.doctor.facts import FAISS
from gog_edge.doctor.finding import State
from gog_edge.engines.manifest import ORT, ORT_CUDA, TENSORRT_RTX
from gog_edge.engines.registry import CPU_SEARCH, FAISS_GPU, FAISS_GPU_INSTALL, EngineChoice
from gog_edge.errors import CheckpointError
from gog_edge.exporting.engines.profiles import check_context
from gog_edge.exporting.engines.sources import bundle_graphs
from gog_edge.files import read_json, write_json
from gog_edge.planner import plan_memory

FAISS_FOR_GPUS = {"version": "1.15.1", "gpu": True, "gpus": 1}


@pytest.fixture
def rtx_machine(tmp_path):
    return sample_machine(pc(tmp_path / "pc"), RTX, CUDA)


def full(gpus):
    """The same GPU with hardly any free memory."""
    return {**gpus, "gpus": [{**gpus["gpus"][0], "free": 2**20}]}


# --- faiss ----------------------------------------------------------------------------------------


def test_faiss_with_a_gpu(rtx_machine):
    report = examine(DEFAULT_BUNDLE, ORT, search=FAISS_GPU, machine=rtx_machine)
    assert report.serves and report.search == FAISS_GPU, report.blocking
    assert finding(report, "faiss on the GPU").detail == "detects 1 GPU"
    detail = finding(report, "memory, ort").detail
    assert detail == f"needs up to {plan_memory(open_bundle(DEFAULT_BUNDLE), search=FAISS_GPU)}"
    assert "of it on the GPU" in detail


def test_vectors_that_do_not_fit_the_gpu(tmp_path):
    machine = sample_machine(pc(tmp_path), full(RTX), CUDA)
    (one,) = examine(DEFAULT_BUNDLE, ORT, search=FAISS_GPU, machine=machine).blocking
    assert one.name == "memory, ort" and "free on the GPU" in one.detail and "search on the CPU" in one.remedy
    assert examine(DEFAULT_BUNDLE, ORT, machine=machine).serves


@pytest.mark.parametrize(("gpus", "library", "detail", "remedy"), [
    (RTX, CPU[FAISS], "this build searches on the CPU", FAISS_GPU_INSTALL),
    (RTX, {**FAISS_FOR_GPUS, "gpus": 0}, "detects 0 GPUs", "install NVIDIA's driver"),
    (NO_DRIVER, {**FAISS_FOR_GPUS, "gpus": 0}, "detects 0 GPUs", ""),
])  # fmt: skip
def test_faiss_without_a_gpu_blocks_every_engine(tmp_path, gpus, library, detail, remedy):
    machine = sample_machine(pc(tmp_path), gpus, {**CUDA, FAISS: library})
    report = examine(DEFAULT_BUNDLE, search=FAISS_GPU, machine=machine)
    one = next(one for one in report.blocking if one.name == "faiss on the GPU")
    assert detail in one.detail and one.remedy.startswith(remedy)
    assert not report.serves and report.to_json()["engines_that_work"] == []
    assert ("GPU" in {one.name for one in report.blocking}) == (gpus is NO_DRIVER)
    assert examine(DEFAULT_BUNDLE, search=CPU_SEARCH, machine=machine).serves


def test_a_jetson_searches_on_the_cpu(tmp_path):
    machine = sample_machine(orin_nano(tmp_path), ORIN, JETPACK_7)
    (one,) = examine(DEFAULT_BUNDLE, ORT, search=FAISS_GPU, machine=machine).blocking
    assert one.name == "faiss on the GPU" and one.remedy == "use --search cpu"


# --- the command ----------------------------------------------------------------------------------


def doctor(*args):
    return CliRunner().invoke(app, ["doctor", *args])


@pytest.mark.parametrize("options", [(), ("--search", CPU_SEARCH)])
def test_the_report_names_the_search(options):
    done = doctor("--json", *options)
    assert done.exit_code == 0 and json.loads(done.stdout)["search"] == CPU_SEARCH


def test_exit_code_1_if_the_search_is_unavailable():
    done = doctor("--search", FAISS_GPU, "--json")
    value = json.loads(done.stdout)
    if value["serves"]:
        pytest.skip("faiss uses a GPU on this machine")
    assert done.exit_code == 1 and value["search"] == FAISS_GPU and value["engines_that_work"] == []
    shown = doctor("--search", FAISS_GPU)
    assert shown.exit_code == 1 and "search faiss-gpu (none works here) cannot serve" in " ".join(shown.stdout.split())


@pytest.mark.parametrize(("args", "message"), [
    (("--search", "gpu"), "unknown search 'gpu'; must be one of cpu, faiss-gpu"),
    (("--search", "tensorrt", "--engine", "tensorrt-rtx"), "unknown search 'tensorrt'; must be one of cpu, faiss-gpu"),
    (("--search", FAISS_GPU, "--engines", "somewhere"), "name the engine"),
])  # fmt: skip
def test_invalid_options(args, message):
    done = doctor(*args)
    assert done.exit_code == 2 and message in done.stderr


def test_serve_and_doctor_share_the_search_option():
    texts = [" ".join(CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"}).output.split())
             for name in ("serve", "doctor")]  # fmt: skip
    assert all("What searches the packs: cpu, faiss-gpu." in text for text in texts)


# --- build commands -------------------------------------------------------------------------------


def set_max_context(bundle, context):
    """Change the manifest as exporting the policy again with another context does."""
    path = bundle / "policy" / "manifest.json"
    write_json(path, read_json(path, what="policy") | {"max_context": context})


def context_in(command):
    words = shlex.split(command)
    return int(words[words.index("--context") + 1]) if "--context" in words else None


@pytest.mark.parametrize(("limit", "recommended"), [(4096, 2048), (2048, 2048), (1024, None), (128, None)])
def test_the_builder_accepts_the_recommended_context(tmp_path, rtx_machine, limit, recommended):
    """Engines have a context of 2048; --context is left out if the policy was exported again with a smaller limit."""
    bundle = tmp_path / "atlas"
    shutil.copytree(DEFAULT_BUNDLE, bundle)
    write_atlas_engines(bundle / "engines" / TENSORRT_RTX, TENSORRT_RTX, version="1.6.0", sms=(89,), context=2048)
    set_max_context(bundle, limit)
    one = finding(examine(bundle, TENSORRT_RTX, machine=rtx_machine), TENSORRT_RTX, "engines")
    assert one.state is State.WRONG and context_in(one.remedy) == recommended
    check_context(bundle_graphs(open_bundle(bundle), context_in(one.remedy)).context, profiles=True)
    if recommended is None:
        with pytest.raises(CheckpointError, match=str(limit)):
            bundle_graphs(open_bundle(bundle), 2048)


def test_the_recommended_command_builds_usable_engines(toy):
    from export.build_engines import main

    folder = build(toy, ORT_CUDA, context=1024)
    set_max_context(toy.root, 512)
    (folder / "text.onnx").unlink()
    one = finding(examine(toy.root, ORT_CUDA), ORT_CUDA, "engines")
    program, arguments = "gog-edge export engines ", shlex.split(one.remedy)[3:]
    assert one.state is State.WRONG and one.remedy.startswith(program)
    assert main([*arguments, "--no-parity"]) == 0
    assert EngineChoice(ORT_CUDA).read_engines(toy.root).built.context == 512
    assert finding(examine(toy.root, ORT_CUDA), ORT_CUDA, "engines").state is State.OK
