import json
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from boxes import (
    CPU,
    CUDA,
    JETPACK_6,
    JETPACK_7,
    NO_DRIVER,
    OLD_ORT,
    ORIN,
    PACKAGES,
    RTX,
    agx_orin,
    box_of,
    lay,
    orin_nano,
    pc,
    thor,
)

from gog_edge.bundle import DEFAULT_BUNDLE
from gog_edge.doctor.box import look_at_box
from gog_edge.doctor.examine import examine
from gog_edge.doctor.finding import State
from gog_edge.doctor.hardware import BROKEN_KERNELS
from gog_edge.doctor.jetson import PowerMode, package_version, parse_release, read_jetson
from gog_edge.doctor.nvidia import Gpus, list_gpus
from gog_edge.doctor.probe import KERNELS, probe
from gog_edge.engines.manifest import BUILT_ENGINES, ORT_CUDA, TENSORRT, TENSORRT_RTX, BuiltEngines, BuiltGraph
from gog_edge.engines.onnx.native import library, why_none
from gog_edge.errors import BackendError, InputError
from gog_edge.files import describe_files, read_json, write_json
from gog_edge.policy.manifest import NATIVE_DECODER_GRAPH

SOURCES = {"decoder": "policy/decoder.onnx", "vision": "policy/vision.onnx", "image": "encoder/image.onnx",
           "text": "encoder/text.onnx"}  # fmt: skip
NOTHING = {"gpus": [], "driver": "", "cuda": [0, 0], "trouble": ""}


def hash_of(path):
    part, name = (DEFAULT_BUNDLE / path).parent, Path(path).name
    return next(one["sha256"] for one in read_json(part / "manifest.json", what="part")["files"] if one["path"] == name)


def built(folder, engine, *, version="", sms=(), ending="engine", context=2048):
    """A folder of engines of the atlas, as the builder writes it; what is in the engines nobody reads here."""
    folder.mkdir(parents=True)
    graphs = []
    for name, source in SOURCES.items():
        (folder / f"{name}.{ending}").write_bytes(name.encode() * 1000)
        graphs.append(BuiltGraph(name, f"{name}.{ending}", {source: hash_of(source)}))
    files = tuple(describe_files(folder, [graph.file for graph in graphs]))
    engines = BuiltEngines(engine, version, sms, context, tuple(graphs), {}, files)
    write_json(folder / "engines.json", engines.to_json())
    return folder


def found(report, what, part=None):
    return next(one for one in report.findings if one.what == what and part in (None, one.part))


# --- this machine ------------------------------------------------------------------------------


def test_this_machine_serves_the_atlas():
    report = examine(DEFAULT_BUNDLE)
    assert report.serves and not report.asked
    assert found(report, "ONNX Runtime").said.count(".") == 2 and found(report, "faiss").state is State.OK
    assert "250 articles" in found(report, "pack 'atlas'").said and "weights" in found(report, "memory, ort").said


@pytest.mark.skipif(bool(list_gpus().gpus), reason="there is a GPU here")
def test_without_a_driver_that_is_said():
    assert "driver" in list_gpus().trouble
    assert Gpus.from_json(probe("gpus")) == list_gpus()


# --- looks that end badly ----------------------------------------------------------------------


@pytest.mark.parametrize(("code", "said"), [
    ("import os; os.kill(os.getpid(), 11)", "ended by signal 11"),
    ("import sys; sys.stderr.write('libfoo.so.3: cannot open\\n'); sys.exit(1)", "exit code 1: libfoo.so.3"),
    ("print('[1, 2]')", "cannot be read"),
    ("pass", "cannot be read"),
    ("import time; time.sleep(60)", "no answer within 1 s"),
])  # fmt: skip
def test_a_look_that_crashes_or_hangs_is_an_answer(code, said):
    with pytest.raises(BackendError, match=said):
        probe("it", seconds=1, command=(sys.executable, "-c", code))


def test_a_look_that_cannot_begin_is_an_answer():
    with pytest.raises(BackendError, match="cannot be run"):
        probe("it", command=("/nowhere/python",))
    with pytest.raises(BackendError, match="No module named 'nowhere'"):
        probe("nowhere")


def test_a_library_may_say_what_it_likes_before_its_answer():
    code = "print('hello'); print('{\"version\": \"1\"}')"
    assert probe("it", command=(sys.executable, "-c", code)) == {"version": "1"}


def test_when_all_looks_fail_the_machine_is_still_told(tmp_path):
    def fails(name):
        raise BackendError(f"no answer of {name}")

    report = examine(DEFAULT_BUNDLE, box=look_at_box(tmp_path, fails))
    assert not report.serves and report.engine == "ort"
    assert {one.what for one in report.blocking} == {"ONNX Runtime", "faiss"}
    assert "no answer of gpus" in found(report, "GPU").said


def test_facts_of_another_form_are_told(tmp_path):
    report = examine(DEFAULT_BUNDLE, box=look_at_box(tmp_path, lambda name: {"surprise": 1}))
    assert "surprise" in found(report, "faiss").said and "could not be asked" in found(report, "GPU").said


# --- files of other boxes ----------------------------------------------------------------------


def test_an_orin_nano(tmp_path):
    jetson = read_jetson(orin_nano(tmp_path))
    assert jetson.model == "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"
    assert (jetson.release, jetson.jetpack) == ("39.2.1", "7.2.1-b49")
    assert (jetson.power, jetson.quickest) == (PowerMode(0, "15W"), PowerMode(2, "MAXN_SUPER"))


def test_an_agx_orin(tmp_path):
    jetson = read_jetson(agx_orin(tmp_path))
    assert (jetson.release, jetson.jetpack, jetson.power.name) == ("36.4.0", "6.1+b123", "MAXN")


def test_a_thor_whose_jetpack_was_removed(tmp_path):
    jetson = read_jetson(thor(tmp_path))
    assert (jetson.release, jetson.jetpack, jetson.power.name, jetson.quickest.number) == ("38.2.2", "7", "120W", 0)


@pytest.mark.parametrize("text", ["", "# R36", "\0\0", "R36 (release), REVISION: 4", "# Rx (release), REVISION: y"])
def test_what_is_no_release(text):
    assert parse_release(text) == ()


def test_a_pc_is_no_jetson_and_a_bare_board_is_one(tmp_path):
    assert read_jetson(pc(tmp_path / "pc")) is None and read_jetson(tmp_path) is None
    bare = lay(tmp_path / "bare", {"proc/device-tree/model": "NVIDIA Jetson Xavier NX Developer Kit\0"})
    assert read_jetson(bare).linux == () and read_jetson(bare).power is None


def test_packages_are_told_by_their_whole_name(tmp_path):
    lay(tmp_path, {"var/lib/dpkg/status": PACKAGES.format(version="6.1+b123", status="install ok installed")})
    assert package_version(tmp_path, "nvidia-jetpack") == "6.1+b123"
    assert package_version(tmp_path, "jetpack") == "" and package_version(tmp_path, "zlib1g") == "1:1.2.11"


def test_files_that_cannot_be_read_say_nothing(tmp_path):
    (tmp_path / "etc/nv_tegra_release").mkdir(parents=True)
    lay(tmp_path, {"proc/device-tree/model": "NVIDIA Jetson AGX Orin\0", "proc/meminfo": "MemTotal: lots kB\n"})
    box = look_at_box(tmp_path, lambda name: NOTHING if name == "gpus" else {"version": "2.0"})
    assert box.memory is None and box.free is None and box.jetson.linux == ()
    report = examine(DEFAULT_BUNDLE, box=box)
    assert report.serves and found(report, "JetPack").state is State.WRONG


# --- what a box can serve with -------------------------------------------------------------------


def test_a_box_with_nothing(tmp_path):
    report = examine(DEFAULT_BUNDLE, box=box_of(pc(tmp_path), NO_DRIVER, {}))
    assert not report.serves
    assert {one.remedy for one in report.blocking} == {"pip install 'gog_edge[cpu]'"}
    assert "driver 580" in found(report, "GPU").remedy


@pytest.mark.parametrize("engine", BUILT_ENGINES)
def test_a_gpu_engine_on_a_box_without_a_gpu(tmp_path, engine):
    report = examine(DEFAULT_BUNDLE, engine, box=box_of(pc(tmp_path), NO_DRIVER, CPU))
    assert report.asked and not report.serves
    commands = [one.remedy for one in report.blocking]
    assert f"python -m export.build_engines {DEFAULT_BUNDLE} --engine {engine}" in commands


def test_an_rtx_box_serves_with_the_engines_that_fit_it(tmp_path):
    box = box_of(pc(tmp_path), RTX, CUDA)
    folder = built(tmp_path / "e", TENSORRT_RTX, version="1.7.1.116", sms=(86, 89, 120))
    report = examine(DEFAULT_BUNDLE, TENSORRT_RTX, folder, box=box)
    assert report.serves, report.blocking
    assert "for SM 86, 89, 120" in found(report, TENSORRT_RTX, "engines").said
    assert "on the GPU" in found(report, "memory, tensorrt-rtx").said
    assert found(report, "faiss on the GPU").state is State.OK


@pytest.mark.parametrize(("version", "sms", "said"), [
    ("1.6.0", (89,), "built by tensorrt-rtx 1.6.0, here is 1.7.1.116"),
    ("1.7.1.116", (86, 120), "for GPUs of SM 86, 120, 'NVIDIA GeForce RTX 4070' is of SM 89"),
])  # fmt: skip
def test_engines_of_another_release_or_gpu_are_told_with_the_command(tmp_path, version, sms, said):
    folder = built(tmp_path / "e", TENSORRT_RTX, version=version, sms=sms)
    report = examine(DEFAULT_BUNDLE, TENSORRT_RTX, folder, box=box_of(pc(tmp_path), RTX, CUDA))
    (one,) = report.blocking
    assert said in one.said
    command = f"python -m export.build_engines {DEFAULT_BUNDLE} --engine tensorrt-rtx --sm 89 --context 2048"
    assert one.remedy == f"{command} --out {folder}"


def test_a_truncated_engine(tmp_path):
    folder = built(tmp_path / "e", TENSORRT_RTX, version="1.7.1.116", sms=(89,))
    (folder / "decoder.engine").write_bytes(b"x")
    report = examine(DEFAULT_BUNDLE, TENSORRT_RTX, folder, box=box_of(pc(tmp_path), RTX, CUDA))
    assert "decoder.engine" in report.blocking[0].said and not report.serves


def test_the_best_engine_that_works_is_taken(tmp_path):
    bundle = tmp_path / "atlas"
    shutil.copytree(DEFAULT_BUNDLE, bundle)
    box = box_of(pc(tmp_path), RTX, CUDA)
    assert examine(bundle, box=box).engine == "ort"
    for engine, ending in ((ORT_CUDA, "onnx"), (TENSORRT_RTX, "engine")):
        built(bundle / "engines" / engine, engine, ending=ending, sms=(89,) * (engine == TENSORRT_RTX),
              version="1.7.1.116" * (engine == TENSORRT_RTX))
        report = examine(bundle, box=box)
        assert (report.engine, report.serves, report.asked) == (engine, True, False)


def test_too_little_memory_of_the_gpu(tmp_path):
    folder = built(tmp_path / "e", ORT_CUDA, ending="onnx")
    full = {**RTX, "gpus": [{**RTX["gpus"][0], "free": 2**20}]}
    report = examine(DEFAULT_BUNDLE, ORT_CUDA, folder, box=box_of(pc(tmp_path), full, CUDA))
    (one,) = report.blocking
    assert one.what == "memory, ort-cuda" and "1 MiB are free on the GPU" in one.said and one.remedy


def test_too_little_memory_of_the_box(tmp_path):
    box = replace(box_of(pc(tmp_path), NO_DRIVER, CPU), free=2**20)
    report = examine(DEFAULT_BUNDLE, box=box)
    assert [one.what for one in report.blocking] == ["memory, ort"]


def test_an_old_driver(tmp_path):
    report = examine(DEFAULT_BUNDLE, TENSORRT_RTX, box=box_of(pc(tmp_path), {**RTX, "cuda": [12, 4]}, CUDA))
    assert "580" in next(one.remedy for one in report.blocking if one.what == "driver")


def test_a_cuda_provider_that_is_listed_and_does_not_work(tmp_path):
    broken = {**CUDA, "onnxruntime": {**CUDA["onnxruntime"], "trouble": "libcublas.so.13 is not there"}}
    report = examine(DEFAULT_BUNDLE, ORT_CUDA, box=box_of(pc(tmp_path), RTX, broken))
    assert "libcublas" in next(one.said for one in report.blocking if one.what == "its CUDA provider")


@pytest.mark.parametrize(("kernels", "state", "said", "remedy"), [
    ({"version": "avx512-bf16"}, State.OK, "avx512-bf16", ""),
    ({"trouble": "no compiler was there; get one"}, State.MISSING, "no compiler was there", "get one"),
    ({"trouble": "ended by signal 11"}, State.MISSING, "ended by signal 11", BROKEN_KERNELS),
    ({"version": "avx2", "trouble": "file too short"}, State.WRONG, "file too short", BROKEN_KERNELS),
    ({"version": "avx2", "better": "avx512"}, State.WRONG,
     "avx2; this processor runs avx512, which could not be compiled",
     "get a newer compiler and install gog_edge again"),
])  # fmt: skip
def test_own_kernels_are_told_and_a_box_serves_without_them(tmp_path, kernels, state, said, remedy):
    box = replace(box_of(pc(tmp_path), NO_DRIVER, {**CPU, KERNELS: kernels}), machine="x86_64")
    report = examine(DEFAULT_BUNDLE, box=box)
    one = found(report, "own kernels", "software")
    assert (one.state, one.said, one.remedy) == (state, said, remedy) and report.serves


def test_kernels_that_do_not_load_keep_a_policy_for_them_from_opening(tmp_path):
    bundle = shutil.copytree(DEFAULT_BUNDLE, tmp_path / "bundle", ignore=shutil.ignore_patterns("engines"))
    path = bundle / "policy" / "manifest.json"
    value = json.loads(path.read_text())
    (bundle / "policy" / NATIVE_DECODER_GRAPH).write_bytes(b"a graph")
    value["files"] += [asdict(entry) for entry in describe_files(bundle / "policy", [NATIVE_DECODER_GRAPH])]
    path.write_text(json.dumps(value))
    for kernels, serves in (({"version": "avx2", "trouble": "file too short"}, False), ({"version": "avx2"}, True),
                            ({"trouble": "none was compiled; get a compiler"}, True)):  # fmt: skip
        box = replace(box_of(pc(tmp_path / str(kernels)), NO_DRIVER, {**CPU, KERNELS: kernels}), machine="x86_64")
        report = examine(bundle, "ort", box=box)
        assert report.serves is serves
    assert examine(DEFAULT_BUNDLE, "ort", box=box).serves


def test_own_kernels_are_nothing_to_other_processors_nor_without_onnx_runtime(tmp_path):
    there = replace(box_of(pc(tmp_path / "pc"), NO_DRIVER, CPU), machine="x86_64")
    bare = replace(box_of(pc(tmp_path / "bare"), NO_DRIVER, {}), machine="x86_64")
    jetson = box_of(orin_nano(tmp_path / "jetson"), ORIN, JETPACK_7)
    for box in (bare, jetson, replace(there, machine="aarch64")):
        assert "own kernels" not in [one.what for one in examine(DEFAULT_BUNDLE, box=box).findings]
    assert "own kernels" in [one.what for one in examine(DEFAULT_BUNDLE, box=there).findings]


def test_this_machines_own_kernels_are_loaded_in_a_process_of_its_own():
    """It is the library that decoders here would take."""
    looked, path = probe(KERNELS), library()
    if path is None:
        assert looked == {"trouble": why_none()}
    else:
        assert path.name == f"operators-{looked['version']}.so" and not looked["trouble"] and not looked["better"]


def test_a_jetson_serves_with_jetpacks_tensorrt(tmp_path):
    folder = built(tmp_path / "e", TENSORRT, version="10.16.2.10", sms=(87,))
    report = examine(DEFAULT_BUNDLE, TENSORRT, folder, box=box_of(orin_nano(tmp_path / "root"), ORIN, JETPACK_7))
    assert report.serves, report.blocking
    assert "on the GPU" not in found(report, "memory, tensorrt").said  # it is the box's own
    assert found(report, "power mode").remedy == "sudo nvpmodel -m 2  # MAXN_SUPER, the quickest"
    assert "Jetson" in found(report, "tensorrt-rtx", "software").remedy


def test_a_jetson_without_jetpacks_bindings(tmp_path):
    report = examine(DEFAULT_BUNDLE, TENSORRT, box=box_of(orin_nano(tmp_path), ORIN, CPU))
    remedies = {one.what: one.remedy for one in report.blocking if one.part == "software"}
    assert "sudo apt install nvidia-jetpack" in remedies["tensorrt"]
    assert remedies["cuda-bindings"] == "pip install 'cuda-bindings>=13,<14'"


def test_jetpack_6_is_refused_with_what_to_install(tmp_path):
    folder = built(tmp_path / "e", TENSORRT, version="10.3.0", sms=(87,))
    report = examine(DEFAULT_BUNDLE, TENSORRT, folder, box=box_of(agx_orin(tmp_path / "root"), ORIN, JETPACK_6))
    (one,) = report.blocking
    assert one.what == "JetPack" and one.state is State.WRONG and one.said == "6.1+b123 (Jetson Linux 36.4.0)"
    assert one.remedy == "JetPack 6 is not supported; install JetPack 7.2, which supports Orin"
    bare = examine(DEFAULT_BUNDLE, TENSORRT, folder, box=box_of(agx_orin(tmp_path / "bare"), ORIN, CPU))
    assert {one.what: one.remedy for one in bare.blocking} == dict.fromkeys(("JetPack", "tensorrt", "cuda-bindings"),
                                                                            one.remedy)


REMOTE = 'url = "http://10.0.0.2:8000/v1"\nmodel = "m"\ndialect = "gog"\ncontinues = "vllm"\nfactor = 28'


def test_an_onnx_runtime_that_is_too_old_loads_no_policy(tmp_path):
    """TensorRT's engines need it for none; where a server runs the policy, nothing does."""
    old = {**JETPACK_7, "onnxruntime": OLD_ORT["onnxruntime"]}
    (one,) = examine(DEFAULT_BUNDLE, box=box_of(orin_nano(tmp_path / "orin"), ORIN, old)).blocking
    assert "1.23.2 is too old for graphs of opset 24" in one.said
    assert one.remedy == "ask for --engine tensorrt on a Jetson"
    (one,) = examine(DEFAULT_BUNDLE, box=box_of(pc(tmp_path / "pc"), NO_DRIVER, OLD_ORT)).blocking
    assert one.remedy == "pip install 'gog_edge[cpu]'"
    bundle = tmp_path / "atlas"
    shutil.copytree(DEFAULT_BUNDLE, bundle)
    toml = (bundle / "bundle.toml").read_text()
    (bundle / "bundle.toml").write_text(toml.replace('path = "policy"', REMOTE))
    remote = examine(bundle, box=box_of(pc(tmp_path / "other"), NO_DRIVER, OLD_ORT))
    assert remote.serves, remote.blocking


@pytest.mark.parametrize(("sm", "bits", "said"), [
    (61, 4, "SM 61 is older than 75"), (75, 4, "it builds no int4 engines for SM 75"), (75, 16, ""),
    (130, 16, "1.7.1.116 builds no engines for SM 130"),
])  # fmt: skip
def test_a_gpu_that_tensorrt_for_rtx_builds_nothing_for(tmp_path, sm, bits, said):
    bundle, gpus = tmp_path / "atlas", {**RTX, "gpus": [{**RTX["gpus"][0], "sm": sm}]}
    shutil.copytree(DEFAULT_BUNDLE, bundle)
    manifest = read_json(bundle / "policy" / "manifest.json", what="policy")
    manifest["weights"]["decoder"] = {"bits": 4, "size": 128} if bits == 4 else None
    write_json(bundle / "policy" / "manifest.json", manifest)
    report = examine(bundle, TENSORRT_RTX, box=box_of(pc(tmp_path / "pc"), gpus, CUDA))
    one = found(report, TENSORRT_RTX, "engines")
    if said:
        assert (one.state, one.said, one.remedy) == (State.WRONG, said, "ask for --engine ort-cuda")
    else:
        assert one.remedy == f"python -m export.build_engines {bundle} --engine tensorrt-rtx --sm 75"


def test_tensorrt_for_rtx_says_what_it_builds_for():
    pytest.importorskip("tensorrt_rtx_bindings")
    assert {75, 86, 120} <= set(probe("tensorrt_rtx_bindings")["sms"])


def test_a_jetson_that_is_too_old(tmp_path):
    lay(orin_nano(tmp_path), {"etc/nv_tegra_release": "# R35 (release), REVISION: 4.1, BOARD: t186ref\n"})
    report = examine(DEFAULT_BUNDLE, TENSORRT, box=box_of(tmp_path, ORIN, JETPACK_7))
    assert "SDK Manager" in next(one.remedy for one in report.blocking if one.what == "JetPack")


# --- bundles -------------------------------------------------------------------------------------


def test_a_bundle_that_is_not_there(tmp_path):
    report = examine(tmp_path / "none", box=box_of(pc(tmp_path), RTX, CUDA))
    assert not report.serves and "there is no" in found(report, "bundle").said


def test_engines_and_folders_that_do_not_go_together(tmp_path):
    with pytest.raises(InputError, match="no engine 'nvidia'"):
        examine(DEFAULT_BUNDLE, "nvidia")
    with pytest.raises(InputError, match="name the engine"):
        examine(DEFAULT_BUNDLE, None, tmp_path)
