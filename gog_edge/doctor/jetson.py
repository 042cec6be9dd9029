"""What a Jetson says of itself in files. Each is read below a root, so that copies of another box's can be looked at.

    /proc/device-tree/model      the board, ended by a zero byte (Devicetree Specification, 2.3.2)
    /etc/nv_tegra_release        "# R36 (release), REVISION: 4.3, GCID: ..., BOARD: generic, ...": Jetson Linux 36.4.3
    /var/lib/dpkg/status         Debian's list of packages; the version of `nvidia-jetpack` is JetPack's
    /var/lib/nvpmodel/status     "pmode:0002": the number of the power mode (nvpmodel)
    /etc/nvpmodel.conf           "< POWER_MODEL ID=2 NAME=MAXN_SUPER >" for each mode, in a table of its own
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

JETPACK_6_LINUX = 36  # which is named, and refused
JETPACKS = {JETPACK_6_LINUX: "6", 38: "7", 39: "7"}  # by Jetson Linux; 38 runs on Thor alone, 39 on Orin too
CUDA = {38: 13, 39: 13}  # major releases, by Jetson Linux: those that gog_edge runs on
UNBOUND = "MAXN"  # how the names of modes without bounds begin


@dataclass(frozen=True, slots=True)
class PowerMode:
    """A mode of nvpmodel."""

    number: int
    name: str  # "" where no table names it


@dataclass(frozen=True, slots=True)
class Jetson:
    """A Jetson's board and its releases; "" and None for what no file says."""

    model: str
    linux: tuple[int, ...] = ()  # Jetson Linux: (36, 4, 3)
    jetpack: str = ""  # as its package is numbered, or 6 or 7 where that is not installed
    power: PowerMode | None = None
    quickest: PowerMode | None = None  # the mode without bounds, where there is one

    @property
    def fits(self) -> bool:
        """Whether its release has a TensorRT that engines can be built and run with."""
        return bool(self.linux) and self.linux[0] in CUDA

    @property
    def release(self) -> str:
        """Jetson Linux as it is written, 36.4.3."""
        return ".".join(map(str, self.linux))


def read_jetson(root: Path = Path("/")) -> Jetson | None:
    """What the files say; None where this is no Jetson. A file that cannot be read says nothing."""
    model = _text(root / "proc/device-tree/model").rstrip("\0\n")
    linux = parse_release(_text(root / "etc/nv_tegra_release"))
    if not linux and "jetson" not in model.lower():
        return None
    modes = parse_modes(_text(root / "etc/nvpmodel.conf"))
    number = re.search(r"pmode:\s*(\d+)", _text(root / "var/lib/nvpmodel/status"))
    quickest = next((mode for mode in reversed(modes) if mode.name.startswith(UNBOUND)), None)
    power = None if number is None else PowerMode(int(number[1]), _name_of(int(number[1]), modes))
    jetpack = package_version(root, "nvidia-jetpack") or JETPACKS.get(linux[0] if linux else 0, "")
    return Jetson(model, linux, jetpack, power, quickest)


def parse_release(text: str) -> tuple[int, ...]:
    """The release in `nv_tegra_release`: (36, 4, 3); () where there is none."""
    found = re.search(r"^# R(\d+) \(release\), REVISION: (\d+(?:\.\d+)*)", text)
    return (int(found[1]), *map(int, found[2].split("."))) if found else ()


def parse_modes(text: str) -> list[PowerMode]:
    """The power modes of `nvpmodel.conf`, in its order."""
    found = re.findall(r"^<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)\s*>", text, re.MULTILINE)
    return [PowerMode(int(number), name) for number, name in found]


def package_version(root: Path, name: str) -> str:
    """Version of an installed Debian package; "" where it is not installed (deb-control(5), dpkg's status file)."""
    entries = _text(root / "var/lib/dpkg/status").split("\n\n")
    entry = next((entry for entry in entries if f"\nPackage: {name}\n" in f"\n{entry}\n"), "")
    found = re.search(r"^Version: (\S+)$", entry, re.MULTILINE)
    return found[1] if found and "\nStatus: install ok installed\n" in entry else ""


def _name_of(number: int, modes: list[PowerMode]) -> str:
    return next((mode.name for mode in modes if mode.number == number), "")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
