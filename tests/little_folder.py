"""The little world as a folder: a picture and a text file for each flag."""

from __future__ import annotations

from pathlib import Path

from little_world import FACTS, FLAGS, flag
from PIL import Image


def write_flag(folder: Path, name: str, news: str = "") -> None:
    """Write a picture and its text; `news` is one more paragraph."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(flag(name)).save(folder / f"{name}.png")
    capital, currency = FACTS[name]
    facts = [f"The capital of {name} is {capital}.", f"The currency of {name} is the {currency}.", news]
    (folder / f"{name}.txt").write_text(f"{name}\n\n" + "\n\n".join(fact for fact in facts if fact))


def write_little_folder(folder: Path) -> Path:
    """Write all flags and a truncated picture."""
    for name in FLAGS:
        write_flag(folder, name)
    (folder / "torn.png").write_bytes((folder / "Spain.png").read_bytes()[:60])
    return folder
