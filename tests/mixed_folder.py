"""A folder of 500 mixed pictures with tables, of which it is known how every file and row must be accounted for."""

from __future__ import annotations

import csv
import gzip
import io
import json
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

PICTURES = 500
_SVG = ('<?xml version="1.0" encoding="{encoding}"?><svg xmlns="http://www.w3.org/2000/svg" width="{width}mm" '
        'height="30mm"><desc>Größe</desc><rect width="100%" height="100%" fill="rgb({red},80,90)"/></svg>')  # fmt: skip
# Suffix and Pillow's name of the format, or how `_content` makes it.
GOOD = [("jpg", "JPEG"), ("JPG", "JPEG"), ("jpeg", "JPEG"), ("jpe", "JPEG"), ("jfif", "JPEG"), ("png", "PNG"), ("PNG",
                                                                                                                "PNG"),
        ("webp", "WEBP"), ("gif", "GIF"), ("bmp", "BMP"), ("dib", "DIB"), ("tif", "TIFF"), ("tiff", "TIFF"), ("avif",
                                                                                                              "AVIF"),
        ("jp2", "JPEG2000"), ("tga", "TGA"), ("ppm", "PPM"), ("pcx", "PCX"), ("qoi", "QOI"), ("ico", "ICO"), ("sgi",
                                                                                                              "SGI"),
        ("svg", "SVG"), ("svgz", "SVGZ"), ("jpg", "CMYK"), ("png", "16"), ("tif", "PAGES"), ("jpg", "PNG"),
        ("", "JPEG")]  # fmt: skip
BAD = [("jpg", "image does not decode", b"\xff\xd8\xff\xe0 no picture"), ("png", "image does not decode",
                                                                          b"\x89PNG\r\n\x1a\n"),
       ("webp", "image does not decode", b"text, not a picture"), ("svg", "image does not decode", b"<svg><g></svg>"),
       ("jpg", "file is empty", b""), ("cr2", "camera raw file is not read; export it as JPEG or TIFF", b"II*\0"),
       ("NEF", "camera raw file is not read; export it as JPEG or TIFF", b"MM\0*"),
       ("xcf", "picture is in a format that is not read; export it as PNG, JPEG or TIFF", b"gimp xcf "),
       ("eps", "picture is in a format that is not read; export it as PNG, JPEG or TIFF", b"%!PS-Adobe"),
       ("pdf", "file is not a picture", b"%PDF-1.7"), ("mp4", "file is not a picture",
                                                       b"\0\0\0\x18ftypmp42")]  # fmt: skip
NAMES = ["photo {n}", "Größe {n}", "Café-{n}", "фото_{n}", "写真{n}", "a#b {n}", "50% {n}", "v.{n}.x", "ÄÖÜ {n}",
         "  {n}  x",
         "q'uote {n}", "semi;colon {n}"]  # fmt: skip
FOLDERS = ["", "", "Room 1", "Room 1/Case B", "Saal Ä", "IMAGES"]


def write_mixed_folder(root: Path) -> tuple[dict[str, Counter[str]], set[str]]:
    """Write the folder and return the numbers that are expected, and the names of the pictures that are used.

    The numbers are "present" and "used" by kind of item, and "skipped" by reason.
    """
    expected: dict[str, Counter[str]] = {"present": Counter(), "used": Counter(), "skipped": Counter()}
    rows: dict[int, list[str]] = {}
    used: set[str] = set()
    for number in range(PICTURES):
        name, reason = _write_picture(root, number)
        expected["present"]["file"] += 1
        if reason:
            expected["skipped"][reason] += 1
        else:
            expected["used"]["file"] += 1
            used.add(unicodedata.normalize("NFC", " ".join(name.split())))
            rows[number] = [name, f"Title {number}", f"Text of {number}, with a comma; and more.", f"CC{number % 3}"]
    _write_tables(root, list(rows.values()), expected)
    _write_others(root, sorted(used), expected)
    return expected, used


def _write_picture(root: Path, number: int) -> tuple[str, str]:
    name = f"{FOLDERS[number % len(FOLDERS)]}/{NAMES[number % len(NAMES)].format(n=number)}".lstrip("/")
    if number % 4 == 3:
        name = unicodedata.normalize("NFD", name)
    bad = BAD[number // 9 % len(BAD)] if number % 9 == 8 else None
    suffix, data = (bad[0], bad[2]) if bad else _content(number)
    path = root / (f"{name}.{suffix}" if suffix else name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path.relative_to(root).as_posix(), bad[1] if bad else ""


def _content(number: int) -> tuple[str, bytes]:
    suffix, kind = GOOD[number % len(GOOD)]
    seed = number % 97  # later pictures repeat the bytes of earlier ones of the same format
    if kind in ("SVG", "SVGZ"):
        encoding = ("UTF-8", "ISO-8859-1", "UTF-16")[number % 3]
        data = _SVG.format(encoding=encoding, width=20 + seed % 60, red=seed).encode(encoding)
        return suffix, gzip.compress(data) if kind == "SVGZ" else data
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((60, 50), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    if kind == "CMYK":
        image.convert("CMYK").save(out, "JPEG")
    elif kind == "16":
        Image.fromarray(rng.integers(0, 65536, (50, 60), dtype=np.uint16)).save(out, "PNG")
    elif kind == "PAGES":
        image.save(out, "TIFF", save_all=True, append_images=[image.rotate(180), image.convert("L")])
    else:
        image.save(out, kind)
    return suffix, out.getvalue()


def _write_tables(root: Path, rows: list[list[str]], expected: dict[str, Counter[str]]) -> None:
    """Describe three quarters of the pictures in five tables; the last ones are not in any table."""
    present, used, skipped = expected["present"], expected["used"], expected["skipped"]
    part = len(rows) // 8
    parts = [rows[at * part : (at + 1) * part] for at in range(6)]

    out = io.StringIO()
    csv.writer(out, delimiter=";").writerows([("Dateiname", "Titel", "Beschreibung", "Lizenz"), *parts[0], *parts[1]])
    text = out.getvalue() + (
        "gone 1.jpg;x;y;z\r\n../outside.jpg;x;y;z\r\n/etc/hosts.png;x;y;z\r\nC:\\a.jpg;x;y;z\r\n;no name;y;z\r\n"
        f"{parts[0][0][0].replace(';', '')};too;many;cells;here\r\n")  # fmt: skip
    (root / "1 katalog.csv").write_text(unicodedata.normalize("NFC", text), encoding="utf-8-sig")
    present["table row"] += 2 * part + 6
    used["table row"] += 2 * part
    skipped.update({"file in the table is missing": 1, "name in the table leads outside of the folder": 3,
                    "row of the table names no file": 1, "row has more cells than the header": 1})  # fmt: skip

    objects = [dict(zip(("image", "name", "description", "rights"), row, strict=True)) for row in parts[2]]
    (root / "2 export.json").write_text(json.dumps({"info": {"total": part}, "data": [*objects, 7, None]}))
    present["table row"] += part + 2
    used["table row"] += part
    skipped["entry of the table is not an object"] += 2

    upper = [[row[0].upper(), *row[1:]] for row in parts[3]]
    lines = ["\t".join(row) for row in [["FICHIER", "TITRE", "TEXTE", "LICENCE"], *upper]]
    (root / "3 liste.tsv").write_bytes("\r".join(lines).encode("utf-16-le"))
    present["table row"] += part
    used["table row"] += part

    (root / "Room 1").mkdir(exist_ok=True)
    (root / "Room 1" / "4.jsonl").write_text("\n".join([*(json.dumps({"path": f"export/{row[0]}", "title": row[1]})
                                                          for row in parts[4]), "{broken"]))  # fmt: skip
    present["table row"] += part + 1
    used["table row"] += part
    skipped["line of the table is not JSON"] += 1

    # Further rows of pictures that are described already: a complement, and a contradiction.
    (root / "5 rights.csv").write_text(
        f'file,author\n"{parts[0][0][0]}",Ann\n"{parts[0][1][0]}",Bob\n', encoding="utf-8")
    (root / "6 other.csv").write_text(f'file,title\n"{parts[5][0][0]}",One\n"{parts[5][0][0]}",Two\n', encoding="utf-8")
    present["table row"] += 4
    used["table row"] += 4

    (root / "7 no column.csv").write_text("Werk,Titel\nx,y\nz,w\n")
    (root / "8 empty.csv").write_text("")
    (root / "9 list.xlsx").write_bytes(b"PK\x03\x04")
    present.update({"table row": 2, "file": 9})
    used["file"] += 6
    skipped.update({"table has no column that names a picture": 3, "table is empty": 1,
                    "spreadsheet is not read; save it as CSV": 1})  # fmt: skip


def _write_others(root: Path, used: list[str], expected: dict[str, Counter[str]]) -> None:
    """Write text files, hidden files and links."""
    picture = next(name for name in used if name.isascii() and "/" not in name and name.endswith(".png"))
    (root / f"{picture}.txt").write_text("A text\nof a picture.")
    (root / "nobody.md").write_text("Of no picture.")
    for name in (".DS_Store", "Thumbs.db", "Room 1/._photo 2.jpg", "__MACOSX/x.jpg"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"x")
    outside = root.parent / "outside.png"
    Image.new("RGB", (60, 50), "red").save(outside)
    (root / "link out.png").symlink_to(outside)
    (root / "link in.png").symlink_to(root / picture)
    (root / "link gone.png").symlink_to(root / "gone.png")
    expected["present"]["file"] += 9
    expected["used"]["file"] += 2
    expected["skipped"].update({"text belongs to no picture": 1, "hidden or system file": 4,
                                "link to a folder, or out of the folder": 1,
                                "link leads to a missing file": 1})  # fmt: skip
