import pytest

from benchmarks.bench_engines import as_table, watched
from gog_edge.bundle import DEFAULT_BUNDLE
from gog_edge.errors import BackendError


def test_a_watched_command_gives_its_last_line_and_its_memory(tmp_path):
    line, peak = watched(["export.build_engines", str(DEFAULT_BUNDLE), "--engine", "ort-cuda", "--no-parity", "--out",
                          str(tmp_path / "out")])  # fmt: skip
    assert line["engine"] == "ort-cuda" and peak > 50
    table = as_table({"atlas": {"graphs": line["graphs"], "seconds": 1.0, "peak_mib": round(peak)}})
    assert table.row_count == len(line["graphs"]) + 1


def test_a_command_that_fails_is_an_error(tmp_path):
    with pytest.raises(BackendError, match="export.build_engines .* failed"):
        watched(["export.build_engines", str(tmp_path), "--engine", "ort-cuda"])
