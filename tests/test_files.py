"""Files that appear whole, and disks that take no more."""

import resource
import subprocess
import sys

import numpy as np
import pytest

from gog_edge.errors import PackError
from gog_edge.files import full_disk_as, sha256_of, write_array


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
