import pytest

from benchmarks.bench_engines import as_table, run_measured
from gog_edge.bundle import DEFAULT_BUNDLE
from gog_edge.errors import BackendError


def test_a_measured_command_returns_its_json_line_and_its_memory(tmp_path):
    line, peak = run_measured(["export.build_engines", str(DEFAULT_BUNDLE), "--engine", "ort-cuda", "--no-parity",
                               "--out", str(tmp_path / "out")])  # fmt: skip
    assert line["engine"] == "ort-cuda" and peak > 50
    table = as_table({"atlas": {"graphs": line["graphs"], "seconds": 1.0, "peak_mib": round(peak)}})
    assert table.row_count == len(line["graphs"]) + 1


def test_a_failing_command_is_reported(tmp_path):
    with pytest.raises(BackendError, match="export.build_engines .* failed"):
        run_measured(["export.build_engines", str(tmp_path), "--engine", "ort-cuda"])
