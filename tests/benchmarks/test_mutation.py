"""Structural mutation of every file that the product reads: a slice of it, and that failures are told apart."""

import json
import time
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from benchmarks.mutation.__main__ import main, select
from benchmarks.mutation.arrays import mutate_binary, mutate_npy, mutate_safetensors
from benchmarks.mutation.databases import mutate_sqlite
from benchmarks.mutation.runner import (
    ACCEPTED,
    CRASH,
    DAMAGE,
    FINE,
    HANG,
    MEMORY,
    REFUSED,
    TRACEBACK,
    UNCHANGED,
    UNFOUNDED,
    Job,
    plan_jobs,
    run_jobs,
    write_seeds,
)
from benchmarks.mutation.targets import TARGETS, Target
from benchmarks.mutation.texts import mutate_bytes, mutate_table, mutate_template, mutate_xml
from benchmarks.mutation.trees import mutate_json, mutate_json_lines, mutate_toml
from gog_edge.errors import PackError

SEED = 20
FAST = ("TOML", "JSON", "CSV", "JSON lines", "safetensors", "npy", "tokenizer", "XML", "FAISS")


def test_every_valid_file_is_accepted_and_no_mutant_ends_in_a_traceback(tmp_path):
    """All files of the product but those of checkpoints, whose valid files take longest to write."""
    targets = [target for target in TARGETS if target.kind in FAST and not target.seed.startswith(("qwen", "clip"))]
    outcomes = []
    write_seeds(targets, tmp_path)
    run_jobs(plan_jobs(targets, 300, SEED), tmp_path, seconds=30, workers=1, on_outcome=outcomes.append)
    assert [one for one in outcomes if one.outcome not in FINE] == []
    assert all(one.outcome == ACCEPTED for one in outcomes if one.job.number == UNCHANGED)
    counts = Counter(one.outcome for one in outcomes)
    assert counts[REFUSED] > 100 and counts[ACCEPTED] > 50 and len(outcomes) > 300


def read_for_the_test(root: Path) -> object:
    """Do what the file says."""
    match (root / "a.txt").read_bytes():
        case b"accept":
            return {"figures": [1.0, "text"]}
        case b"refuse":
            raise PackError("no")
        case b"raise":
            raise KeyError("a")
        case b"nan":
            return {"figures": [float("nan")]}
        case b"half":
            return ("\ud800",)
        case b"hang":
            time.sleep(60)
        case b"eat":
            return bytearray(2**33)
        case b"die":
            import ctypes

            ctypes.string_at(0)
    return None


def choose(rng: Random, data: bytes) -> bytes:
    """Return one of the words that `read_for_the_test` knows, in turn."""
    words = (b"refuse", b"accept", b"raise", b"nan", b"hang", b"half", b"eat", b"die", b"accept")
    return words[int(data)]


def test_outcomes_are_told_apart(tmp_path):
    """A child that hangs or dies is replaced, and the next mutant is read."""
    expected = [REFUSED, ACCEPTED, TRACEBACK, DAMAGE, HANG, DAMAGE, MEMORY, CRASH, ACCEPTED]
    jobs = []
    for number in range(len(expected)):
        (tmp_path / f"seed{number}").mkdir()
        (tmp_path / f"seed{number}" / "a.txt").write_text(str(number))
        jobs.append(Job(Target("text", f"seed{number}", "a.txt", choose, read_for_the_test), 0, SEED))
    (tmp_path / "refused").mkdir()
    (tmp_path / "refused" / "a.txt").write_bytes(b"refuse")
    jobs.append(Job(Target("text", "refused", "a.txt", choose, read_for_the_test), UNCHANGED, SEED))
    outcomes = []
    run_jobs(jobs, tmp_path, seconds=2, workers=1, on_outcome=outcomes.append)
    assert [one.outcome for one in outcomes] == [*expected, UNFOUNDED], outcomes
    assert [one.job for one in outcomes] == jobs
    details = {one.outcome: one.detail for one in outcomes}
    assert "KeyError" in details[TRACEBACK] and "test_mutation.py" in details[TRACEBACK]
    assert "2 s" in details[HANG] and "SIGSEGV" in details[CRASH]


GOOD_JSON = json.dumps({"name": "x", "list": [1, 2.5, None], "table": {"a": True, "b": "text"}}).encode()
HEADER = b"{'descr': '<f2', 'fortran_order': False, 'shape': (2, 2), }"
NPY = b"\x93NUMPY\x01\0v\0" + HEADER.ljust(117) + b"\n" + b"\0" * 8
TENSORS = json.dumps({"__metadata__": {"format": "pt"}, "a.weight": {"dtype": "F32", "shape": [1, 2],
                                                                      "data_offsets": [0, 8]}}).encode()  # fmt: skip


@pytest.mark.parametrize("mutate, data, least", [
    (mutate_json, GOOD_JSON, 250), (mutate_toml, b'a = 1\n[b]\nc = [1.5, "x"]\n[[d]]\ne = true\n', 250),
    (mutate_json_lines, GOOD_JSON + b"\n" + GOOD_JSON, 200), (mutate_table, b"file,title\na.png,A\nb.png,B\n", 200),
    (mutate_xml, b"<a><b c='1'>text</b><b/></a>", 150),
    (mutate_template, b"{% for m in messages %}{{ m.role == 'x' }}{% endfor %}", 150),
    (mutate_bytes, b"first\nsecond\n", 100), (mutate_binary, bytes(range(256)), 250), (mutate_npy, NPY, 50),
    (mutate_safetensors, len(TENSORS).to_bytes(8, "little") + TENSORS + b"\0" * 8, 150),
])  # fmt: skip
def test_mutants_differ_and_are_the_same_for_a_seed(mutate, data, least):
    mutants = [mutate(Random(number), data) for number in range(400)]
    assert mutants == [mutate(Random(number), data) for number in range(400)]
    assert len(set(mutants)) >= least and sum(mutant == data for mutant in mutants) < 60


def test_a_mutated_database_is_often_still_one(tmp_path):
    store = next(target for target in TARGETS if target.kind == "SQLite")
    write_seeds([store], tmp_path)
    data = (tmp_path / store.seed / store.file).read_bytes()
    mutants = [mutate_sqlite(Random(number), data) for number in range(12)]
    assert sum(mutant.startswith(b"SQLite format 3\0") and mutant != data for mutant in mutants) > 6


def test_the_command_writes_counts_and_keeps_failing_mutants(tmp_path, capsys):
    arguments = ["--only", "text_encoder/manifest.json", "--count", "12", "--workers", "1", "--seed", "3",
                 "--keep", str(tmp_path / "keep"), "--out", str(tmp_path / "mutation.json")]  # fmt: skip
    assert main(arguments) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads((tmp_path / "mutation.json").read_text()) == line
    assert line["mutants"] == 13 == sum(line["by_format"]["JSON"].values()) and line["failures"] == 0
    assert not (tmp_path / "keep").exists()
    assert main(["--only", "PDF"]) == 2 and "'PDF' is neither a format" in capsys.readouterr().err
    assert {target.kind for target in select(["CSV"])} == {"CSV"} and len(select([])) == len(TARGETS)
