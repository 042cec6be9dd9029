"""The little world as a person keeps it: a folder of flags, a text beside each."""

from __future__ import annotations

from pathlib import Path

from little_world import FACTS, FLAGS, flag
from PIL import Image


def write_flag(folder: Path, name: str, news: str = "") -> None:
    """A picture and what is said of it."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(flag(name)).save(folder / f"{name}.png")
    capital, currency = FACTS[name]
    facts = [f"The capital of {name} is {capital}.", f"The currency of {name} is the {currency}.", news]
    (folder / f"{name}.txt").write_text(f"{name}\n\n" + "\n\n".join(fact for fact in facts if fact))


def write_little_folder(folder: Path) -> Path:
    """Every flag, and a picture that cannot be read."""
    for name in FLAGS:
        write_flag(folder, name)
    (folder / "torn.png").write_bytes((folder / "Spain.png").read_bytes()[:60])
    return folder
