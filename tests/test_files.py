"""Files that appear whole, disks that take no more, and documents, arrays and tokenizers that may be damaged."""

import json
import os
import resource
import struct
import subprocess
import sys
import time
import tomllib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from gog_edge.bundle import DEFAULT_BUNDLE
from gog_edge.errors import ArtifactError, PackError
from gog_edge.files import (
    full_disk_as,
    map_array,
    open_tokenizer,
    parse_json,
    parse_toml,
    path_inside,
    read_array_header,
    read_bounded,
    read_json,
    sha256_of,
    write_array,
    write_json,
)


@pytest.mark.parametrize("array", [
    np.arange(12, dtype=np.float16).reshape(3, 4), np.asfortranarray(np.arange(12.0).reshape(3, 4)),
    np.arange(20, dtype=np.int64)[::2], np.empty((0, 5), np.float16), np.array([], np.int64),
])  # fmt: skip
def test_an_array_is_read_as_it_was_written(tmp_path, array):
    write_array(tmp_path / "a.npy", array)
    for mode in (None, "r"):
        read = np.load(tmp_path / "a.npy", mmap_mode=mode if array.size else None, allow_pickle=False)
        assert read.dtype == array.dtype and read.shape == array.shape and (read == array).all()


def test_a_full_disk_is_said_and_the_older_file_stays(tmp_path):
    write_array(tmp_path / "a.npy", np.arange(3))
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, usual[1]))  # as a disk that takes no more
    try:
        with pytest.raises(PackError, match="disk of .* is full"), full_disk_as(tmp_path, PackError):
            write_array(tmp_path / "a.npy", np.zeros((1000, 512), np.float16))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert np.load(tmp_path / "a.npy").tolist() == [0, 1, 2]


def test_hashing_tells_how_far_it_is(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 3_000_000)
    told = []
    assert sha256_of(tmp_path / "a", told.append) == sha256_of(tmp_path / "a")
    assert sum(told) == 3_000_000 and len(told) == 3


# Opens a hundred files where fifty are allowed, then where more are.
_OPENS = """
import resource
from contextlib import ExitStack
from gog_edge.files import allow_open_files
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (50, hard))
for may in (False, True):
    try:
        with ExitStack() as stack:
            for _ in range(100):
                stack.enter_context(open("/dev/null"))
        assert may
    except OSError as exc:
        assert not may, exc
    allow_open_files(100)
allow_open_files(2**40)
assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
"""


def test_a_process_may_keep_more_files_open_than_is_usual():
    subprocess.run([sys.executable, "-c", _OPENS], check=True, timeout=60)


# --- documents ----------------------------------------------------------------------------------


@pytest.mark.parametrize("text, said", [
    ("", "Expecting value"), ("{", "Expecting property name"), ("[1,]", "Expecting value"), ("{} {}", "Extra data"),
    ("NaN", "NaN is not a number in JSON"), ("[-Infinity]", "-Infinity is not a number"),
    ("[1e999]", "1e999 is out of"),
    ('{"a": 1, "b": 2, "a": 3}', "the key 'a' occurs twice"), ("9" * 5000, "5000 digits, the limit is 100"),
    ("[" * 65 + "]" * 65, "more than 64 levels"), ("[" * 200_000, "more than 64 levels"),
    ('{"a":' * 99, "64 levels|Expect"), ('"\\ud800"', "surrogates not allowed"),
    ('{"\\udfff": 1}', "surrogates not allowed"), (b"\xff\xfe{\0}\0", "decode"),
])  # fmt: skip
def test_what_is_not_json_is_refused(text, said):
    with pytest.raises(ValueError, match=said):
        parse_json(text)


def test_json_is_read_as_the_standard_defines_it():
    text = '{"a": [1, -0.5, 1e3, true, null, "\\ud83d\\ude00", "\\u0000"], "": {"n": 1000000000000000019884624838656}}'
    assert parse_json(text) == json.loads(text) == parse_json(b"\xef\xbb\xbf" + text.encode())
    assert parse_json("[" * 64 + "]" * 64) == json.loads("[" * 64 + "]" * 64)


@pytest.mark.parametrize("text, said", [
    ("a = ", "Invalid value"), ("a = 1\na = 2", "Cannot overwrite"), ("a = " + "9" * 5000, "4300 digits"),
    ("a = " + "[" * 500 + "]" * 500, "more than 64 levels"), (".".join(["a"] * 100_000) + " = 1", "64 levels"),
    ("[" + ".".join(["'a b'"] * 100_000) + "]", "64 levels"),
    ("x = { " + " . ".join(["a"] * 30_000) + " = 1 }", "64 levels"),
])  # fmt: skip
def test_toml_that_would_take_minutes_or_gigabytes_is_refused(text, said):
    started = time.monotonic()
    with pytest.raises(ValueError, match=said):
        parse_toml(text)
    assert time.monotonic() - started < 5


def test_toml_is_read_as_tomllib_reads_it():
    text = '[a.b]\n"c.d" = [1.5, "x"]\nlong = """\n' + "Look. " * 200 + '"""\n'
    assert parse_toml(text) == tomllib.loads(text) == parse_toml("\ufeff" + text)


def test_only_regular_files_of_limited_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "big").write_bytes(b"x" * 11)
    for path, said in ((tmp_path / "pipe", "not a regular file"), (Path("/dev/zero"), "not a regular file"),
                       (tmp_path, "not a regular file|Is a directory"), (tmp_path / "big", "more than 10 bytes"),
                       (tmp_path / ("x" * 300), "File name too long"), (Path("a\0b"), "null byte")):  # fmt: skip
        with pytest.raises(OSError, match=said):
            read_bounded(path, 10)
        with pytest.raises(PackError, match="pack: (cannot read|'.*big' is not JSON)"):
            read_json(path, what="pack", error=PackError)
    assert read_bounded(tmp_path / "big", 11) == b"x" * 11


def test_written_json_is_strict(tmp_path):
    for value in (float("nan"), [float("inf")], {"a": -float("inf")}):
        with pytest.raises(ValueError):
            write_json(tmp_path / "a.json", value)
    assert not (tmp_path / "a.json").exists()


def test_a_path_stays_inside_its_folder(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "link").symlink_to("/etc")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("in/none", "in/../in", "in", "."):
        assert path_inside(tmp_path, name) == tmp_path / name
    for name, said in (("..", "outside"), ("/etc/passwd", "outside"), ("link/passwd", "outside"), ("a\0b", "NUL"),
                       ("x" * 300, "not a path .*too long"), ("loop/a", "not a path")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            path_inside(tmp_path, name)


# --- arrays -------------------------------------------------------------------------------------


def npy(header, body=b"\0" * 24, version=b"\x01\0", size=None):
    """A .npy file with any header."""
    text = header.encode() + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H", len(text) if size is None else size) + text + body


GOOD = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }"


def test_an_array_is_mapped(tmp_path):
    (tmp_path / "a.npy").write_bytes(npy(GOOD))
    mapped = map_array(tmp_path / "a.npy", (2, 3), ("float16", "float32"), what="policy")
    assert isinstance(mapped, np.memmap) and mapped.tolist() == [[0.0] * 3] * 2 and not mapped.flags.writeable


@pytest.mark.parametrize("data", [
    b"", b"\x93NUMPY", npy(GOOD)[:9], npy(GOOD)[:40], npy(GOOD, b"\0" * 23), npy(GOOD, version=b"\x09\0"),
    npy(GOOD, size=9), npy(GOOD, size=65535), npy("{}"), npy("'" * 200), npy("(" * 9000), npy("-" * 9000),
    npy("[" * 3000 + "]" * 3000),
    *(npy(GOOD.replace("(2, 3)", shape)) for shape in ("(-2, 3)", "(2, 3.0)", f"({2**60}, {2**60})", "(2, None)",
                                                       "('a', 3)", "(3, 2)", "()", "(6,)", "(0, 3)", "[2, 3]",
                                                       "(True, 3)")),
    *(npy(GOOD.replace("<f4", dtype)) for dtype in ("|O", "<U4", "<f8", "|V4", "", "x", "<c8", "|b1", "<i4")),
    npy(GOOD.replace("False", "True")), npy(GOOD.replace("False", "1")), npy(GOOD.replace("'<f4'", "[('a', '<f4')]")),
])  # fmt: skip
def test_a_damaged_array_is_refused(tmp_path, data):
    (tmp_path / "a.npy").write_bytes(data)
    with pytest.raises(ArtifactError, match="policy: '.*a.npy' (cannot be read as a NumPy array|must hold float32)"):
        map_array(tmp_path / "a.npy", (2, 3), ("float32",), what="policy")
    with (tmp_path / "a.npy").open("rb") as stream, suppress(ValueError):
        _, shape, _, dtype = read_array_header(stream)
        assert dtype.kind in "fiub" and all(side >= 0 for side in shape)


# --- tokenizers ---------------------------------------------------------------------------------


def test_a_damaged_tokenizer_is_refused(tmp_path):
    text = (DEFAULT_BUNDLE / "encoder" / "tokenizer.json").read_text()
    path = tmp_path / "tokenizer.json"
    path.write_text(text)
    assert open_tokenizer(path, what="encoder").encode("flag").ids
    for damaged in ("", "{}", "[]", "null", text[:-2], text.replace('"model"', '"modal"'), "[" * 100_000, text + "}",
                    text.replace('"vocab"', '"vocabulary"'), text.replace('"merges"', '"merge"')):  # fmt: skip
        path.write_text(damaged)
        with pytest.raises(ArtifactError, match="encoder: cannot read '.*tokenizer.json' as a tokenizer"):
            open_tokenizer(path, what="encoder")
    with pytest.raises(ArtifactError, match="as a tokenizer"):
        open_tokenizer(tmp_path / "none.json", what="encoder")
