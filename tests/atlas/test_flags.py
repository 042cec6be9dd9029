import io
import json
import tarfile

import numpy as np
import pytest

from atlas.flags import FLAG_HEIGHT, FLAG_WIDTH, invented_flag, load_flag_icons, png_pixels
from gog_edge.errors import ArtifactError

SVG = ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 480"><path fill="{}" d="M0 0h640v480H0z"/>'
       '<path fill="{}" d="M0 0h320v480H0z"/></svg>')  # fmt: skip
ROWS = [{"code": "aa", "name": "Aland", "iso": True}, {"code": "bb", "name": "Borduria", "iso": False}]
FILES = {
    "package.json": b"{}",
    "country.json": json.dumps(ROWS).encode(),
    "css/flag-icons.css": b".fi {}",
    "flags/1x1/aa.svg": b"not read",
    "flags/4x3/aa.svg": SVG.format("#ff0000", "#0000ff").encode(),
    "flags/4x3/bb.svg": SVG.format("#00ff00", "#ffffff").encode(),
}


def write_tarball(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def write_folder(path, files):
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


@pytest.mark.parametrize("write", [write_tarball, write_folder])
def test_the_package_is_read_from_tarball_and_folder(tmp_path, write):
    flags, names = load_flag_icons(write(tmp_path / "flag-icons-7.5.0.tgz", FILES))
    assert names == {"aa": "Aland", "bb": "Borduria"} and sorted(flags) == ["aa", "bb"]
    pixels = png_pixels(flags["aa"])
    assert pixels.shape == (FLAG_HEIGHT, FLAG_WIDTH, 3) and pixels.dtype == np.uint8
    assert pixels[100, 20].tolist() == [0, 0, 255] and pixels[100, 300].tolist() == [255, 0, 0]


def test_a_missing_package_is_reported_with_the_download_command(tmp_path):
    with pytest.raises(ArtifactError, match=r"npm pack flag-icons@7\.5\.0"):
        load_flag_icons(tmp_path / "flag-icons-7.5.0.tgz")


@pytest.mark.parametrize("write", [write_tarball, write_folder])
@pytest.mark.parametrize(
    ("name", "data"),
    [("country.json", None), ("country.json", b"{"), ("country.json", b"5"), ("country.json", b'[{"code": "aa"}]'),
     ("flags/4x3/aa.svg", b"no picture"), ("flags/4x3/aa.svg", b"\xff\xff")],
)  # fmt: skip
def test_other_packages_are_refused(tmp_path, write, name, data):
    files = {key: value for key, value in (FILES | {name: data}).items() if value is not None}
    with pytest.raises(ArtifactError, match=r"other'.* flag-icons 7\.5\.0"):
        load_flag_icons(write(tmp_path / "other", files))


def test_invalid_and_truncated_tarballs_are_refused(tmp_path):
    whole = write_tarball(tmp_path / "whole", {**FILES, "flags/4x3/cc.svg": np.random.default_rng(0).bytes(9000)})
    broken = whole.read_bytes()
    for name, data in (("letter", b"Dear Sir"), ("empty", b""), ("half", broken[: len(broken) // 2])):
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(ArtifactError, match=name):
            load_flag_icons(path)


def test_invented_flags_depend_on_the_seed_alone_and_differ():
    drawn = [invented_flag(seed) for seed in range(8)]
    assert all(flag.shape == (FLAG_HEIGHT, FLAG_WIDTH, 3) and flag.dtype == np.uint8 for flag in drawn)
    assert np.array_equal(drawn[3], invented_flag(3))
    for n, one in enumerate(drawn):
        assert one.std() > 5
        for other in drawn[:n]:
            assert np.abs(one[::8, ::8].astype(int) - other[::8, ::8]).mean() > 2
