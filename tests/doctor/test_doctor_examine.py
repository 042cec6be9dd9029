"""What the doctor reports for this machine and for others, with their remedies."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from sample_machines import (
    CPU,
    CUDA,
    JETPACK_6,
    JETPACK_7,
    NO_DRIVER,
    OLD_ORT,
    ORIN,
    RTX,
    agx_orin,
    orin_nano,
    pc,
    sample_machine,
    write_files,
)

from gog_edge.bundle import DEFAULT_BUNDLE
from gog_edge.doctor.examine import examine
from gog_edge.doctor.finding import State
from gog_edge.doctor.hardware import REINSTALL_OPERATORS
from gog_edge.doctor.probe import NATIVE_OPERATORS
from gog_edge.engines.manifest import BUILT_ENGINES, ORT_CUDA, TENSORRT, TENSORRT_RTX, BuiltGraph, EngineManifest
from gog_edge.errors import InputError
from gog_edge.files import describe_files, read_json, write_json
from gog_edge.policy.manifest import NATIVE_DECODER_GRAPH

SOURCES = {"decoder": "policy/decoder.onnx", "vision": "policy/vision.onnx", "image": "encoder/image.onnx",
           "text": "encoder/text.onnx"}  # fmt: skip
REMOTE = 'url = "http://10.0.0.2:8000/v1"\nmodel = "m"\ndialect = "gog"\ncontinues = "vllm"\nfactor = 28'


def sha256_in_bundle(path):
    part, name = (DEFAULT_BUNDLE / path).parent, Path(path).name
    return next(one["sha256"] for one in read_json(part / "manifest.json", what="part")["files"] if one["path"] == name)


def write_atlas_engines(folder, engine, *, version="", sms=(), ending="engine", context=2048):
    """Write a folder of engines of the atlas as the builder does; the engine files themselves are placeholders."""
    folder.mkdir(parents=True)
    graphs = []
    for name, source in SOURCES.items():
        (folder / f"{name}.{ending}").write_bytes(name.encode() * 1000)
        graphs.append(BuiltGraph(name, f"{name}.{ending}", {source: sha256_in_bundle(source)}))
    files = tuple(describe_files(folder, [graph.file for graph in graphs]))
    built = EngineManifest(engine, version, sms, context, tuple(graphs), {}, files)
    write_json(folder / "engines.json", built.to_json())
    return folder


def finding(report, name, part=None):
    return next(one for one in report.findings if one.name == name and part in (None, one.part))


def test_this_machine_serves_the_atlas():
    report = examine(DEFAULT_BUNDLE)
    assert report.serves and not report.requested
    assert finding(report, "ONNX Runtime").detail.count(".") == 2 and finding(report, "faiss").state is State.OK
    assert "250 articles" in finding(report, "pack 'atlas'").detail
    assert "weights" in finding(report, "memory, ort").detail


def test_json_keys_of_a_report():
    """Scripts read them: `gog-edge doctor --json`."""
    value = examine(DEFAULT_BUNDLE).to_json()
    assert value.keys() == {"bundle", "engine", "asked", "search", "serves", "engines_that_work", "findings"}
    assert value["findings"][0].keys() == {"part", "what", "state", "said", "remedy", "needed_by"}


# --- engines and machines -------------------------------------------------------------------------


def test_a_machine_without_libraries(tmp_path):
    report = examine(DEFAULT_BUNDLE, machine=sample_machine(pc(tmp_path), NO_DRIVER, {}))
    assert not report.serves
    assert {one.remedy for one in report.blocking} == {"pip install 'gog_edge[cpu]'"}
    assert "driver 580" in finding(report, "GPU").remedy


@pytest.mark.parametrize("engine", BUILT_ENGINES)
def test_a_gpu_engine_without_a_gpu(tmp_path, engine):
    report = examine(DEFAULT_BUNDLE, engine, machine=sample_machine(pc(tmp_path), NO_DRIVER, CPU))
    assert report.requested and not report.serves
    remedies = [one.remedy for one in report.blocking]
    assert f"gog-edge export engines {DEFAULT_BUNDLE} --engine {engine}" in remedies


@pytest.mark.parametrize(("architecture", "remedy"), [
    ("x86_64", "pip install 'gog_edge[tensorrt]'"), ("aarch64", "use --engine tensorrt-rtx"),
])  # fmt: skip
def test_tensorrt_without_its_module(tmp_path, architecture, remedy):
    machine = replace(sample_machine(pc(tmp_path), RTX, CUDA), architecture=architecture)
    one = finding(examine(DEFAULT_BUNDLE, TENSORRT, machine=machine), TENSORRT, "software")
    assert (one.state, one.remedy) == (State.MISSING, remedy)


def test_engines_that_fit_the_gpu(tmp_path):
    machine = sample_machine(pc(tmp_path), RTX, CUDA)
    folder = write_atlas_engines(tmp_path / "e", TENSORRT_RTX, version="1.7.1.116", sms=(86, 89, 120))
    report = examine(DEFAULT_BUNDLE, TENSORRT_RTX, folder, machine=machine)
    assert report.serves, report.blocking
    assert "for SM 86, 89, 120" in finding(report, TENSORRT_RTX, "engines").detail
    assert "on the GPU" in finding(report, "memory, tensorrt-rtx").detail
    assert finding(report, "faiss on the GPU").state is State.OK


@pytest.mark.parametrize(("version", "sms", "message"), [
    ("1.6.0", (89,), "built with tensorrt-rtx 1.6.0, but 1.7.1.116 is installed"),
    ("1.7.1.116", (86, 120), "built for SM 86, 120, but 'NVIDIA GeForce RTX 4070' has SM 89"),
])  # fmt: skip
def test_engines_of_another_release_or_gpu(tmp_path, version, sms, message):
    folder = write_atlas_engines(tmp_path / "e", TENSORRT_RTX, version=version, sms=sms)
    machine = sample_machine(pc(tmp_path), RTX, CUDA)
    (one,) = examine(DEFAULT_BUNDLE, TENSORRT_RTX, folder, machine=machine).blocking
    assert message in one.detail
    command = f"gog-edge export engines {DEFAULT_BUNDLE} --engine tensorrt-rtx --sm 89 --context 2048"
    assert one.remedy == f"{command} --out {folder}"


def test_a_truncated_engine(tmp_path):
    folder = write_atlas_engines(tmp_path / "e", TENSORRT_RTX, version="1.7.1.116", sms=(89,))
    (folder / "decoder.engine").write_bytes(b"x")
    machine = sample_machine(pc(tmp_path), RTX, CUDA)
    report = examine(DEFAULT_BUNDLE, TENSORRT_RTX, folder, machine=machine)
    assert "decoder.engine" in report.blocking[0].detail and not report.serves


def test_the_best_working_engine_is_chosen(tmp_path):
    bundle = tmp_path / "atlas"
    shutil.copytree(DEFAULT_BUNDLE, bundle)
    machine = sample_machine(pc(tmp_path), RTX, CUDA)
    assert examine(bundle, machine=machine).engine == "ort"
    for engine, ending in ((ORT_CUDA, "onnx"), (TENSORRT_RTX, "engine")):
        rtx = engine == TENSORRT_RTX
        write_atlas_engines(bundle / "engines" / engine, engine, ending=ending, sms=(89,) * rtx,
                            version="1.7.1.116" * rtx)  # fmt: skip
        report = examine(bundle, machine=machine)
        assert (report.engine, report.serves, report.requested) == (engine, True, False)


def test_too_little_gpu_memory(tmp_path):
    folder = write_atlas_engines(tmp_path / "e", ORT_CUDA, ending="onnx")
    full = {**RTX, "gpus": [{**RTX["gpus"][0], "free": 2**20}]}
    machine = sample_machine(pc(tmp_path), full, CUDA)
    (one,) = examine(DEFAULT_BUNDLE, ORT_CUDA, folder, machine=machine).blocking
    assert one.name == "memory, ort-cuda" and "1 MiB are free on the GPU" in one.detail and one.remedy


def test_too_little_host_memory(tmp_path):
    machine = replace(sample_machine(pc(tmp_path), NO_DRIVER, CPU), free=2**20)
    assert [one.name for one in examine(DEFAULT_BUNDLE, machine=machine).blocking] == ["memory, ort"]


def test_an_old_driver(tmp_path):
    machine = sample_machine(pc(tmp_path), {**RTX, "cuda": [12, 4]}, CUDA)
    report = examine(DEFAULT_BUNDLE, TENSORRT_RTX, machine=machine)
    assert "580" in next(one.remedy for one in report.blocking if one.name == "driver")


def test_a_cuda_provider_whose_libraries_are_missing(tmp_path):
    broken = {**CUDA, "onnxruntime": {**CUDA["onnxruntime"], "problem": "libcublas.so.13 cannot be loaded"}}
    report = examine(DEFAULT_BUNDLE, ORT_CUDA, machine=sample_machine(pc(tmp_path), RTX, broken))
    assert "libcublas" in next(one.detail for one in report.blocking if one.name == "CUDA provider of ONNX Runtime")


@pytest.mark.parametrize(("sm", "bits", "message"), [
    (61, 4, "SM 61 is not supported; 75 or later is required"), (75, 4, "int4 engines cannot be built for SM 75"),
    (75, 16, ""), (130, 16, "1.7.1.116 cannot build engines for SM 130"),
])  # fmt: skip
def test_gpus_that_tensorrt_for_rtx_does_not_support(tmp_path, sm, bits, message):
    bundle, gpus = tmp_path / "atlas", {**RTX, "gpus": [{**RTX["gpus"][0], "sm": sm}]}
    shutil.copytree(DEFAULT_BUNDLE, bundle)
    manifest = read_json(bundle / "policy" / "manifest.json", what="policy")
    manifest["weights"]["decoder"] = {"bits": 4, "size": 128} if bits == 4 else None
    write_json(bundle / "policy" / "manifest.json", manifest)
    report = examine(bundle, TENSORRT_RTX, machine=sample_machine(pc(tmp_path / "pc"), gpus, CUDA))
    one = finding(report, TENSORRT_RTX, "engines")
    if message:
        assert (one.state, one.detail, one.remedy) == (State.WRONG, message, "use --engine ort-cuda")
    else:
        assert one.remedy == f"gog-edge export engines {bundle} --engine tensorrt-rtx --sm 75"


# --- native operators -----------------------------------------------------------------------------


@pytest.mark.parametrize(("library", "state", "detail", "remedy"), [
    ({"version": "avx512-bf16"}, State.OK, "avx512-bf16", ""),
    ({"problem": "not compiled; install a compiler"}, State.MISSING, "not compiled", "install a compiler"),
    ({"problem": "terminated by signal 11"}, State.MISSING, "terminated by signal 11", REINSTALL_OPERATORS),
    ({"version": "avx2", "problem": "file too short"}, State.WRONG, "file too short", REINSTALL_OPERATORS),
    ({"version": "avx2", "better": "avx512"}, State.WRONG,
     "avx2; this processor supports avx512, which was not compiled",
     "install a newer C++ compiler and install gog_edge again"),
])  # fmt: skip
def test_native_operators_are_optional(tmp_path, library, state, detail, remedy):
    machine = sample_machine(pc(tmp_path), NO_DRIVER, {**CPU, NATIVE_OPERATORS: library})
    report = examine(DEFAULT_BUNDLE, machine=replace(machine, architecture="x86_64"))
    one = finding(report, "native operators", "software")
    assert (one.state, one.detail, one.remedy) == (state, detail, remedy) and report.serves


def test_a_policy_that_uses_native_operators_needs_a_library_that_loads(tmp_path):
    bundle = shutil.copytree(DEFAULT_BUNDLE, tmp_path / "bundle", ignore=shutil.ignore_patterns("engines"))
    path = bundle / "policy" / "manifest.json"
    value = json.loads(path.read_text())
    (bundle / "policy" / NATIVE_DECODER_GRAPH).write_bytes(b"a graph")
    value["files"] += [asdict(entry) for entry in describe_files(bundle / "policy", [NATIVE_DECODER_GRAPH])]
    path.write_text(json.dumps(value))
    for library, serves in (({"version": "avx2", "problem": "file too short"}, False), ({"version": "avx2"}, True),
                            ({"problem": "not compiled; install a compiler"}, True)):  # fmt: skip
        root = pc(tmp_path / str(library))
        machine = sample_machine(root, NO_DRIVER, {**CPU, NATIVE_OPERATORS: library})
        machine = replace(machine, architecture="x86_64")
        assert examine(bundle, "ort", machine=machine).serves is serves
    assert examine(DEFAULT_BUNDLE, "ort", machine=machine).serves


def test_native_operators_are_not_reported_without_x86_64_or_onnx_runtime(tmp_path):
    x86 = replace(sample_machine(pc(tmp_path / "pc"), NO_DRIVER, CPU), architecture="x86_64")
    bare = replace(sample_machine(pc(tmp_path / "bare"), NO_DRIVER, {}), architecture="x86_64")
    jetson = sample_machine(orin_nano(tmp_path / "jetson"), ORIN, JETPACK_7)
    for machine in (bare, jetson, replace(x86, architecture="aarch64")):
        assert "native operators" not in [one.name for one in examine(DEFAULT_BUNDLE, machine=machine).findings]
    assert "native operators" in [one.name for one in examine(DEFAULT_BUNDLE, machine=x86).findings]


# --- Jetson ---------------------------------------------------------------------------------------


def test_a_jetson_with_jetpacks_tensorrt(tmp_path):
    folder = write_atlas_engines(tmp_path / "e", TENSORRT, version="10.16.2.10", sms=(87,))
    machine = sample_machine(orin_nano(tmp_path / "root"), ORIN, JETPACK_7)
    report = examine(DEFAULT_BUNDLE, TENSORRT, folder, machine=machine)
    assert report.serves, report.blocking
    assert "on the GPU" not in finding(report, "memory, tensorrt").detail  # the GPU has no memory of its own
    assert finding(report, "power mode").remedy == "sudo nvpmodel -m 2  # MAXN_SUPER, the fastest"
    assert "Jetson" in finding(report, "tensorrt-rtx", "software").remedy


def test_a_jetson_without_tensorrt_and_bindings(tmp_path):
    machine = sample_machine(orin_nano(tmp_path), ORIN, CPU)
    report = examine(DEFAULT_BUNDLE, TENSORRT, machine=machine)
    remedies = {one.name: one.remedy for one in report.blocking if one.part == "software"}
    assert "sudo apt install nvidia-jetpack" in remedies["tensorrt"]
    assert remedies["cuda-bindings"] == "pip install 'cuda-bindings>=13,<14'"


def test_jetpack_6_is_not_supported(tmp_path):
    folder = write_atlas_engines(tmp_path / "e", TENSORRT, version="10.3.0", sms=(87,))
    machine = sample_machine(agx_orin(tmp_path / "root"), ORIN, JETPACK_6)
    (one,) = examine(DEFAULT_BUNDLE, TENSORRT, folder, machine=machine).blocking
    assert one.name == "JetPack" and one.state is State.WRONG and one.detail == "6.1+b123 (Jetson Linux 36.4.0)"
    assert one.remedy == "JetPack 6 is not supported; install JetPack 7.2, which supports Orin"
    machine = sample_machine(agx_orin(tmp_path / "bare"), ORIN, CPU)
    bare = examine(DEFAULT_BUNDLE, TENSORRT, folder, machine=machine)
    remedies = {other.name: other.remedy for other in bare.blocking}
    assert remedies == dict.fromkeys(("JetPack", "tensorrt", "cuda-bindings"), one.remedy)


def test_an_unsupported_jetson_linux(tmp_path):
    write_files(orin_nano(tmp_path), {"etc/nv_tegra_release": "# R35 (release), REVISION: 4.1, BOARD: t186ref\n"})
    report = examine(DEFAULT_BUNDLE, TENSORRT, machine=sample_machine(tmp_path, ORIN, JETPACK_7))
    assert "SDK Manager" in next(one.remedy for one in report.blocking if one.name == "JetPack")


# --- bundles --------------------------------------------------------------------------------------


def test_an_onnx_runtime_that_is_too_old_for_the_policy(tmp_path):
    """TensorRT does not need it for the policy, and a remote policy needs none."""
    old = {**JETPACK_7, "onnxruntime": OLD_ORT["onnxruntime"]}
    machine = sample_machine(orin_nano(tmp_path / "orin"), ORIN, old)
    (one,) = examine(DEFAULT_BUNDLE, machine=machine).blocking
    assert "ONNX Runtime 1.23.2 is too old" in one.detail and "1.24 or later" in one.detail
    assert one.remedy == "use --engine tensorrt on a Jetson"
    machine = sample_machine(pc(tmp_path / "pc"), NO_DRIVER, OLD_ORT)
    (one,) = examine(DEFAULT_BUNDLE, machine=machine).blocking
    assert one.remedy == "pip install 'gog_edge[cpu]'"
    bundle = tmp_path / "atlas"
    shutil.copytree(DEFAULT_BUNDLE, bundle)
    toml = (bundle / "bundle.toml").read_text()
    (bundle / "bundle.toml").write_text(toml.replace('path = "policy"', REMOTE))
    remote = examine(bundle, machine=machine)
    assert remote.serves, remote.blocking


def test_a_missing_bundle(tmp_path):
    report = examine(tmp_path / "none", machine=sample_machine(pc(tmp_path), RTX, CUDA))
    assert not report.serves and str(tmp_path / "none") in finding(report, "bundle").detail


def test_options_that_do_not_fit_together(tmp_path):
    with pytest.raises(InputError, match="unknown engine 'nvidia'"):
        examine(DEFAULT_BUNDLE, "nvidia")
    with pytest.raises(InputError, match="name the engine"):
        examine(DEFAULT_BUNDLE, None, tmp_path)
