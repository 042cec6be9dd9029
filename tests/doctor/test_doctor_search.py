"""`gog-edge doctor --search`: whether the search can be had, and what it takes; and commands that build again."""

import json
import shlex
import shutil

import pytest
from boxes import CPU, CUDA, JETPACK_7, NO_DRIVER, ORIN, RTX, box_of, orin_nano, pc
from built_engines import build, toy  # noqa: F401
from little_fixtures import little_pack_folder, tiny_encoder, tiny_encoder_folder  # noqa: F401
from test_doctor import built, found
from typer.testing import CliRunner

from gog_edge.bundle import DEFAULT_BUNDLE, open_bundle
from gog_edge.cli import app
from gog_edge.doctor.box import FAISS
from gog_edge.doctor.examine import examine
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
def rtx_box(tmp_path):
    return box_of(pc(tmp_path / "pc"), RTX, CUDA)


def full(gpu):
    """The same GPU with next to no room."""
    return {**gpu, "gpus": [{**gpu["gpus"][0], "free": 2**20}]}


# --- by FAISS -------------------------------------------------------------------------------------


def test_faiss_searches_on_a_gpu_that_it_sees(rtx_box):
    report = examine(DEFAULT_BUNDLE, ORT, search=FAISS_GPU, box=rtx_box)
    assert report.serves and report.search == FAISS_GPU, report.blocking
    assert found(report, "faiss on the GPU").said == "sees 1 GPU"
    said = found(report, "memory, ort").said
    assert said == f"takes {plan_memory(open_bundle(DEFAULT_BUNDLE), search=FAISS_GPU)}" and "of it on the GPU" in said


def test_vectors_that_the_gpu_has_no_room_for(tmp_path):
    box = box_of(pc(tmp_path), full(RTX), CUDA)
    (one,) = examine(DEFAULT_BUNDLE, ORT, search=FAISS_GPU, box=box).blocking
    assert one.what == "memory, ort" and "free on the GPU" in one.said and "search it on the CPU" in one.remedy
    assert examine(DEFAULT_BUNDLE, ORT, box=box).serves


@pytest.mark.parametrize(("gpus", "library", "said", "remedy"), [
    (RTX, CPU[FAISS], "this build searches on the CPU", FAISS_GPU_INSTALL),
    (RTX, {**FAISS_FOR_GPUS, "gpus": 0}, "sees 0 GPUs", "install NVIDIA's driver"),
    (NO_DRIVER, {**FAISS_FOR_GPUS, "gpus": 0}, "sees 0 GPUs", ""),
])  # fmt: skip
def test_faiss_without_a_gpu_keeps_every_engine_from_serving(tmp_path, gpus, library, said, remedy):
    box = box_of(pc(tmp_path), gpus, {**CUDA, FAISS: library})
    report = examine(DEFAULT_BUNDLE, search=FAISS_GPU, box=box)
    one = next(one for one in report.blocking if one.what == "faiss on the GPU")
    assert said in one.said and one.remedy.startswith(remedy)
    assert not report.serves and report.to_json()["engines_that_work"] == []
    assert ("GPU" in {one.what for one in report.blocking}) == (gpus is NO_DRIVER)
    assert examine(DEFAULT_BUNDLE, search=CPU_SEARCH, box=box).serves


def test_a_jetson_has_no_faiss_for_gpus_and_is_told_what_it_has(tmp_path):
    box = box_of(orin_nano(tmp_path), ORIN, JETPACK_7)
    (one,) = examine(DEFAULT_BUNDLE, ORT, search=FAISS_GPU, box=box).blocking
    assert one.what == "faiss on the GPU" and one.remedy == "ask for --search cpu"


# --- the command ----------------------------------------------------------------------------------


def doctor(*args):
    return CliRunner().invoke(app, ["doctor", *args])


@pytest.mark.parametrize("asked", [(), ("--search", CPU_SEARCH)])
def test_the_report_says_what_searches(asked):
    done = doctor("--json", *asked)
    assert done.exit_code == 0 and json.loads(done.stdout)["search"] == CPU_SEARCH


def test_a_search_that_cannot_be_had_is_exit_code_1_and_said():
    told = doctor("--search", FAISS_GPU, "--json")
    value = json.loads(told.stdout)
    if value["serves"]:
        pytest.skip("faiss here uses a GPU")
    assert told.exit_code == 1 and value["search"] == FAISS_GPU and value["engines_that_work"] == []
    shown = doctor("--search", FAISS_GPU)
    assert shown.exit_code == 1 and "search faiss-gpu (none works here) cannot serve" in " ".join(shown.stdout.split())


@pytest.mark.parametrize(("args", "says"), [
    (("--search", "gpu"), "there is no search 'gpu'; known are cpu, faiss-gpu"),
    (("--search", "tensorrt", "--engine", "tensorrt-rtx"), "there is no search 'tensorrt'; known are cpu, faiss-gpu"),
    (("--search", FAISS_GPU, "--engines", "somewhere"), "name the engine"),
])  # fmt: skip
def test_what_cannot_be_asked_for_is_refused(args, says):
    done = doctor(*args)
    assert done.exit_code == 2 and says in done.stderr


def test_serve_and_doctor_have_one_option():
    texts = [" ".join(CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"}).output.split())
             for name in ("serve", "doctor")]  # fmt: skip
    assert all("What searches the packs: cpu, faiss-gpu." in text for text in texts)


# --- engines built again --------------------------------------------------------------------------


def shrink(bundle, context):
    """What exporting the policy again with fewer tokens does to its manifest."""
    path = bundle / "policy" / "manifest.json"
    write_json(path, read_json(path, what="policy") | {"max_context": context})


def context_in(command):
    words = shlex.split(command)
    return int(words[words.index("--context") + 1]) if "--context" in words else None


@pytest.mark.parametrize(("now", "kept"), [(4096, 2048), (2048, 2048), (1024, None), (128, None)])
def test_the_builder_takes_the_context_that_is_told(tmp_path, rtx_box, now, kept):
    bundle = tmp_path / "atlas"
    shutil.copytree(DEFAULT_BUNDLE, bundle)
    built(bundle / "engines" / TENSORRT_RTX, TENSORRT_RTX, version="1.6.0", sms=(89,), context=2048)
    shrink(bundle, now)
    one = found(examine(bundle, TENSORRT_RTX, box=rtx_box), TENSORRT_RTX, "engines")
    assert one.state is State.WRONG and context_in(one.remedy) == kept
    check_context(bundle_graphs(open_bundle(bundle), context_in(one.remedy)).context, profiles=True)
    if kept is None:
        with pytest.raises(CheckpointError, match=f"at most {now}"):
            bundle_graphs(open_bundle(bundle), 2048)


def test_the_command_that_is_told_builds_engines_that_are_taken(toy):  # noqa: F811
    from export.build_engines import main

    folder = build(toy, ORT_CUDA, context=1024)
    shrink(toy.root, 512)
    (folder / "text.onnx").unlink()
    one = found(examine(toy.root, ORT_CUDA), ORT_CUDA, "engines")
    program, arguments = "python -m export.build_engines ", shlex.split(one.remedy)[3:]
    assert one.state is State.WRONG and one.remedy.startswith(program)
    assert main([*arguments, "--no-parity"]) == 0
    assert EngineChoice(ORT_CUDA).read(toy.root).built.context == 512
    assert found(examine(toy.root, ORT_CUDA), ORT_CUDA, "engines").state is State.OK
