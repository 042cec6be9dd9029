"""Facts that the doctor reads from files, tested with files of other machines."""

import pytest
from sample_machines import PACKAGES, agx_orin, orin_nano, pc, thor, write_files

from gog_edge.bundle import DEFAULT_BUNDLE
from gog_edge.doctor.examine import examine
from gog_edge.doctor.facts import PowerMode, collect_facts, package_version, parse_release, read_jetson
from gog_edge.doctor.finding import State
from gog_edge.errors import BackendError

NO_GPUS = {"gpus": [], "driver": "", "cuda": [0, 0], "problem": ""}


def finding(report, name):
    return next(one for one in report.findings if one.name == name)


def test_orin_nano(tmp_path):
    jetson = read_jetson(orin_nano(tmp_path))
    assert jetson.model == "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"
    assert (jetson.release, jetson.jetpack) == ("39.2.1", "7.2.1-b49")
    assert (jetson.power, jetson.fastest) == (PowerMode(0, "15W"), PowerMode(2, "MAXN_SUPER"))


def test_agx_orin(tmp_path):
    jetson = read_jetson(agx_orin(tmp_path))
    assert (jetson.release, jetson.jetpack, jetson.power.name) == ("36.4.0", "6.1+b123", "MAXN")


def test_thor_with_removed_jetpack_packages(tmp_path):
    jetson = read_jetson(thor(tmp_path))
    assert (jetson.release, jetson.jetpack, jetson.power.name, jetson.fastest.number) == ("38.2.2", "7", "120W", 0)


@pytest.mark.parametrize("text", ["", "# R36", "\0\0", "R36 (release), REVISION: 4", "# Rx (release), REVISION: y"])
def test_malformed_release_file(text):
    assert parse_release(text) == ()


def test_pc_is_not_a_jetson_and_a_bare_board_is(tmp_path):
    assert read_jetson(pc(tmp_path / "pc")) is None and read_jetson(tmp_path) is None
    bare = write_files(tmp_path / "bare", {"proc/device-tree/model": "NVIDIA Jetson Xavier NX Developer Kit\0"})
    assert read_jetson(bare).linux == () and read_jetson(bare).power is None


def test_package_names_match_exactly(tmp_path):
    write_files(tmp_path, {"var/lib/dpkg/status": PACKAGES.format(version="6.1+b123", status="install ok installed")})
    assert package_version(tmp_path, "nvidia-jetpack") == "6.1+b123"
    assert package_version(tmp_path, "jetpack") == "" and package_version(tmp_path, "zlib1g") == "1:1.2.11"


def test_unreadable_files_leave_facts_unknown(tmp_path):
    (tmp_path / "etc/nv_tegra_release").mkdir(parents=True)
    write_files(tmp_path, {"proc/device-tree/model": "NVIDIA Jetson AGX Orin\0", "proc/meminfo": "MemTotal: lots kB\n"})
    machine = collect_facts(tmp_path, lambda name: NO_GPUS if name == "gpus" else {"version": "2.0"})
    assert machine.memory is None and machine.free is None and machine.jetson.linux == ()
    report = examine(DEFAULT_BUNDLE, machine=machine)
    assert report.serves and finding(report, "JetPack").state is State.WRONG


def test_the_machine_is_reported_even_if_all_probes_fail(tmp_path):
    def fail(name):
        raise BackendError(f"no result of {name}")

    report = examine(DEFAULT_BUNDLE, machine=collect_facts(tmp_path, fail))
    assert not report.serves and report.engine == "ort"
    assert {one.name for one in report.blocking} == {"ONNX Runtime", "faiss"}
    assert "no result of gpus" in finding(report, "GPU").detail


def test_probe_results_of_another_form_are_reported(tmp_path):
    report = examine(DEFAULT_BUNDLE, machine=collect_facts(tmp_path, lambda name: {"surprise": 1}))
    assert "surprise" in finding(report, "faiss").detail and "could not be queried" in finding(report, "GPU").detail
