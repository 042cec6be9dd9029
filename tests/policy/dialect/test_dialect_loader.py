"""Dialect files: validation, prompt files next to them, copies of them."""

import dataclasses
import json
import tomllib
from importlib import resources

import pytest

from gog_edge.errors import DialectError
from gog_edge.policy.dialect.dialect import GIVE_UP
from gog_edge.policy.dialect.loader import copy_dialect, load_dialect, shipped
from gog_edge.types import Observation

FOLDER = resources.files("gog_edge.policy.dialect")
TEXT = (FOLDER / "qwen_agent.toml").read_text()


def changed(tmp_path, *changes):
    text = TEXT
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("schema = 1", "schema = 1\nflavour = 2", "unknown key 'flavour'"),
        ("[thinking]", "[thought]", "unknown key 'thought'"),
        ("[crop]", "crop = 1\n[other]", "unknown key 'other'"),
        ('source = "any"', 'source = "all"', "'source' must be one of 'given', 'any', got 'all'"),
        ("image_base = 0", "image_base = -1", "'image_base' must be at least 0, got -1"),
        ("image_base = 0", 'image_base = "img"', "'image_base' must be an integer, got 'img'"),
        ("min_side = 32", "min_side = 0", "'min_side' must be at least 1, got 0"),
        ("min_side = 32", "min_side = 3.5", "'min_side' must be an integer, got 3.5"),
        ("pad = 0.0", "pad = -0.1", "'pad' must be at least 0, got -0.1"),
        ("pad = 0.0", "pad = nan", "'pad' must be a finite number, got nan"),
        ("pad = 0.0", "pad = inf", "'pad' must be a finite number, got inf"),
        ("min_pixels = 262144", "min_pixels = true", "'min_pixels' must be an integer, got True"),
        ("min_pixels = 262144", "minimum_pixels = 262144", "unknown key 'minimum_pixels'; known keys are source"),
        ("rounds = 20", "rounds = 0", "'rounds' must be at least 1, got 0"),
        ("rounds = 20", "rounds = 20\ntext_searches = -1", "'text_searches' must be at least 0, got -1"),
        ('open = "<think>"', 'open = "<think>"\nbudget = 0', "'budget' must be at least 1, got 0"),
        ('skip_until = "</think>"', 'skip_until = ""', "\\[thinking\\] requires 'skip_until'"),
        ('layout = "image_text"', 'role = "tool"', "unknown key 'role'"),
        ('layout = "image_text"', 'layout = "upside down"', "'layout' must be one of .*, got 'upside down'"),
        ('open = "<think>"', 'open = ["<think>"]', "'open' must be a string, got"),
        ('call = ["<tool_call>", "</tool_call>"]', "", "\\[tool_calls\\] requires the key 'call'"),
        ('call = ["<tool_call>", "</tool_call>"]', 'call = ["<tool_call>", ""]', "'call'.1. must be a non-empty"),
        ('call = ["<tool_call>", "</tool_call>"]', 'call = ["a", "b"]\nanswer = ["", ""]',
         "'answer'.0. must be a non-empty string"),
        ('does = "image_search"', 'does = "dance"', "'does' must be one of 'answer', 'text_search'"),
        ('does = "image_search"', 'does = "answer"', "tool 'image_search' does 'answer'"),
        ('query = "query"', "", "tool 'web_search' does 'text_search'"),
        ('box = "bbox_2d"', 'box = ""', "tool 'image_zoom_in_tool' does 'gaze_search'"),
        ('name = "image_search"', 'name = "web_search"', "unique name"),
        ('name = "image_search"', 'name = "image_search"\nsize = 3', "unknown key 'size'"),
        ('question = "{question}"', 'question = "What?"', "must contain {question}"),
        ('question = "{question}"', "", "one of 'question' and 'question_file'"),
        ('question = "{question}"', 'question = "{question}"\nquestion_file = "q.txt"', "one of 'question'"),
        ('question = "{question}"', 'question_file = "none.txt"', "none.txt' cannot be read"),
        ('question = "{question}"', 'question_file = "../q.txt"', "must be in the folder of the dialect"),
        ('question = "{question}"', 'question_file = "/etc/q.txt"', "must be in the folder of the dialect"),
        ('question = "{question}"', 'question_file = "decoder.onnx"', "end in"),
        ('give_up = "', 'gave_up = "', "gave_up"),
        ('[answer]\nnot_found = "not in my snapshot"', "", "requires the key 'answer'"),
    ],
)
def test_an_invalid_value_is_rejected_with_its_key_and_reason(tmp_path, old, new, named):
    path = changed(tmp_path, (old, new))
    with pytest.raises(DialectError, match=named) as caught:
        load_dialect(path)
    assert "mine.toml" in str(caught.value)


def test_a_dialect_has_either_tags_or_tool_calls(tmp_path):
    path = tmp_path / "mine.toml"
    tags = tomllib.loads((FOLDER / "gog.toml").read_text())["tags"]
    table = "[tags]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in tags.items())
    without_syntax = TEXT[: TEXT.index("[tool_calls]")] + TEXT[TEXT.index("[crop]") :]
    path.write_text(without_syntax + table)
    assert load_dialect(path).tags == load_dialect("gog").tags
    for text in (TEXT + table, without_syntax):
        path.write_text(text)
        with pytest.raises(DialectError, match=r"mine\.toml: .* either the table \[tags\] or the table \[tool_calls\]"):
            load_dialect(path)


def test_a_dialect_without_tools_is_rejected(tmp_path):
    path = tmp_path / "mine.toml"
    head, *_ = TEXT.split("[[tool_calls.tools]]")
    for tools in ("", "tools = []\n", "tools = 5\n", 'tools = ["web_search"]\n'):
        path.write_text(head + tools + TEXT[TEXT.index("[crop]") :])
        with pytest.raises(DialectError, match="mine.toml.*tools"):
            load_dialect(path)


def test_a_file_above_the_size_limit_is_rejected(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(TEXT + "#" * 2**20)
    with pytest.raises(DialectError, match="it has more than 262144 bytes"):
        load_dialect(path)


def test_prompts_are_read_from_files_and_copied(tmp_path):
    (tmp_path / "system.txt").write_text("Theirs: {tools}\n")
    (tmp_path / "asked.md").write_text("Round one: {question}?")
    start, end = TEXT.index('system = """'), TEXT.index("question =")
    path = changed(tmp_path, (TEXT[start:end], 'system_file = "system.txt"\n'),
                   ('question = "{question}"', 'question_file = "asked.md"'))
    dialect = load_dialect(path)
    assert dialect.system_prompt.startswith('Theirs: {"type": "function"')
    assert dialect.question == "Round one: {question}?"
    out = tmp_path / "out"
    out.mkdir()
    copy, written = copy_dialect(path, out)
    assert copy == dialect and set(written) == {"dialect.toml", "system.txt", "asked.md"}
    assert load_dialect(out / "dialect.toml") == dialect


@pytest.mark.parametrize("name", shipped())
def test_copies_differ_only_in_the_box_frame(name, tmp_path):
    dialect, written = copy_dialect(name, tmp_path)
    path = tmp_path / "dialect.toml"
    assert written == ("dialect.toml",) and load_dialect(path) == dialect == load_dialect(name)
    assert path.read_bytes() == (FOLDER / f"{name}.toml").read_bytes()
    moved, _ = copy_dialect(path, tmp_path, "rel1")
    prompt = dialect.system_prompt.replace("in pixels of the picture", "in shares of the picture's width and height, "
                                         "from 0 to 1") if name == "gog" else dialect.system_prompt
    assert load_dialect(path) == moved == dataclasses.replace(dialect, box_frame="rel1", system_prompt=prompt)


def test_a_box_frame_that_cannot_be_replaced_is_rejected(tmp_path):
    path = changed(tmp_path, ('box_frame = "rel1000"', "box_frame = 'rel1000'"))
    with pytest.raises(DialectError, match="its box frame cannot be replaced"):
        copy_dialect(path, tmp_path, "rel1")
    assert not (tmp_path / "dialect.toml").exists()


def test_the_notice_give_up_is_optional():
    assert GIVE_UP in load_dialect("qwen_agent").notices and GIVE_UP not in load_dialect("gog").notices
    with pytest.raises(DialectError, match="dialect gog has no notice 'give_up'"):
        load_dialect("gog").render_observation(Observation(notice=GIVE_UP))
