"""What `pack build` says about a folder of 500 mixed pictures: items used plus items skipped are the items present."""

import json
import os
import re
from collections import Counter
from io import StringIO

import pytest
from mixed_folder import PICTURES, write_mixed_folder
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from gog_edge.cli import app
from gog_edge.cli.render_pack import _items_table
from gog_edge.indexing.build import build_pack
from gog_edge.indexing.sources.open import open_source
from gog_edge.retrieval.manifest import COMMAND
from gog_edge.retrieval.pack import Pack


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Return the folder of the pack, what is expected, and the names of the pictures that are used."""
    root = tmp_path_factory.mktemp("mixed")
    (root / "source").mkdir()
    expected, used = write_mixed_folder(root / "source")
    build_pack(open_source(root / "source"), root / "pack", name="mixed", encoder=None, workers=1)
    return root, expected, used


@pytest.fixture(scope="module")
def report(mixed):
    done = CliRunner().invoke(app, ["pack", "info", str(mixed[0] / "pack"), "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_every_file_of_the_folder_is_counted(mixed, report):
    root, expected, _ = mixed
    files = sum(len(names) for _, _, names in os.walk(root / "source"))
    assert {item["kind"]: item["present"] for item in report["items"]} == expected["present"]
    assert expected["present"]["file"] == files > PICTURES


def test_items_used_plus_items_skipped_are_the_items_present(mixed, report):
    _, expected, _ = mixed
    for item in report["items"]:
        assert item["present"] == item["used"] + item["skipped"], item
        assert item["used"] == expected["used"][item["kind"]], item
    skipped = Counter()
    for one in report["skipped"]:
        skipped[one["reason"]] += one["count"]
    assert skipped == expected["skipped"]


def test_every_used_picture_is_an_article_with_its_row(mixed):
    root, expected, used = mixed
    pack = Pack.open(root / "pack", None)
    try:
        articles = {key: pack.store.article_by_key(key) for key in used}
        assert all(article is not None for article in articles.values())
        titled = sum(title.startswith("Title ") for title in pack.store.titles(articles.values()).values())
        assert titled >= 5 * (len(used) // 8) - 1  # of the five tables with rows
        shown = pack.store.main_images(articles.values())
        assert set(shown) == set(articles.values())
    finally:
        pack.close()


def test_notices_name_tables_and_columns(report):
    text = "\n".join(report["notices"])
    for part in ("'7 no column.csv' is not used", "'Werk', 'Titel'", "'8 empty.csv' is not used: it is empty",
                 "6 other.csv, row 2", "6 other.csv, row 3"):
        assert part in text, part


def test_the_summary_is_printed(mixed):
    done = CliRunner().invoke(app, ["pack", "info", str(mixed[0] / "pack")], env={"COLUMNS": "160"})
    assert done.exit_code == 0, done.output
    words = " ".join(done.output.split())
    for part in ("present", "used", "skipped", "table row", "hidden or system file",
                 "warning: table '7 no column.csv'"):
        assert part in words, part
    assert "not accounted for" not in words


def test_workers_count_the_same(mixed, tmp_path, report):
    root, _, _ = mixed
    done = CliRunner().invoke(app, ["pack", "build", str(root / "source"), str(tmp_path / "mixed"), "--text-only",
                                    "--workers", "2"])  # fmt: skip
    assert done.exit_code == 0, done.output
    last = json.loads(done.stdout.splitlines()[-1])
    assert all(last[name] == report[name] for name in ("items", "skipped", "notices"))


def test_columns_are_given_and_remembered_for_resuming(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "list.csv").write_text("Nr alt;Was\n17;Vase\n")
    Image.new("RGB", (60, 50), "red").save(tmp_path / "source" / "17.png")
    words = ["pack", "build", str(tmp_path / "source"), str(tmp_path / "pack"), "--text-only", "--workers", "1",
             "--column", "file=Nr alt", "--column", "title=Was"]  # fmt: skip
    done = CliRunner().invoke(app, [*words, "--stop-after", "reading"])
    assert done.exit_code == 0, done.output
    assert "--column 'file=Nr alt' --column title=Was" in (tmp_path / "pack" / COMMAND).read_text()
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    pack = Pack.open(tmp_path / "pack", None)
    assert list(pack.store.titles([1]).values()) == ["Vase"]
    pack.close()
    done = CliRunner().invoke(app, [*words[:3], str(tmp_path / "other"), "--text-only", "--column", "file=Farbe"])
    assert done.exit_code != 0 and "'Nr alt', 'Was'" in done.stderr and "Traceback" not in done.output


def test_an_encoding_is_given_and_remembered_for_resuming(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "list.csv").write_bytes("file,title\n17.png,Синяя ваза\n".encode("cp1251"))
    Image.new("RGB", (60, 50), "red").save(tmp_path / "source" / "17.png")
    words = ["pack", "build", str(tmp_path / "source"), str(tmp_path / "pack"), "--text-only", "--workers", "1"]
    for name, code, part in (("klingon", 2, "klingon"), ("ascii", 1, "table 'list.csv' cannot be decoded as")):
        done = CliRunner().invoke(app, [*words, "--encoding", name], env={"COLUMNS": "200"})
        assert done.exit_code == code and part in done.stderr and "Traceback" not in done.output
    done = CliRunner().invoke(app, [*words, "--encoding", "cp1251", "--stop-after", "reading"])
    assert done.exit_code == 0, done.output
    assert "--encoding cp1251" in (tmp_path / "pack" / COMMAND).read_text()
    done = CliRunner().invoke(app, [*words, "--encoding", "cp1251"])
    assert done.exit_code == 0, done.output
    (tmp_path / "more").mkdir()
    (tmp_path / "source" / "17.png").rename(tmp_path / "more" / "18.png")
    (tmp_path / "more" / "list.csv").write_bytes("file,title\n18.png,Чаша\n".encode("cp1251"))
    done = CliRunner().invoke(app, ["pack", "add", words[3], str(tmp_path / "more"), "--encoding", "cp1251"])
    assert done.exit_code == 0, done.output
    pack = Pack.open(tmp_path / "pack", None)
    keys = {"17.png": "Синяя ваза", "18.png": "Чаша"}
    articles = {key: pack.store.article_by_key(key) for key in keys}
    assert {key: pack.store.titles([article])[article] for key, article in articles.items()} == keys
    pack.close()


def test_items_that_are_lost_are_shown(tmp_path):
    console = Console(file=StringIO(), width=100)
    console.print(_items_table([{"kind": "page", "present": 5, "used": 2, "skipped": 1}]))
    shown = console.file.getvalue()
    assert "not accounted for" in shown and re.findall(r"\d+", shown) == ["5", "2", "1", "2"]
