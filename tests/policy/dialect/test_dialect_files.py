"""Dialect files: what a bad one is told, prompts beside them, copies of them."""

import dataclasses
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
        ("[tool_calls]\n", "[tags]\n[tool_calls]\n", "both \\[tags\\] and \\[tool_calls\\]"),
        ("schema = 1", "schema = 1\nflavour = 2", "unknown key 'flavour'"),
        ("[thinking]", "[thought]", "unknown key 'thought'"),
        ("[crop]", "crop = 1\n[other]", "unknown key 'other'"),
        ('source = "any"', 'source = "all"', "source 'all' is none of given, any"),
        ("image_base = 0", "image_base = -1", "image_base is -1, which is less than 0"),
        ("image_base = 0", 'image_base = "img"', "image_base is 'img', which is no int"),
        ("min_side = 32", "min_side = 0", "min_side is 0, which is less than 1"),
        ("min_side = 32", "min_side = 3.5", "min_side is 3.5"),
        ("pad = 0.0", "pad = -0.1", "pad is -0.1"),
        ("pad = 0.0", "pad = nan", "pad is nan"),
        ("pad = 0.0", "pad = inf", "pad is inf"),
        ("min_pixels = 262144", "min_pixels = true", "min_pixels is True"),
        ("min_pixels = 262144", "minimum_pixels = 262144", "unknown key 'minimum_pixels'; known are source"),
        ("rounds = 20", "rounds = 0", "rounds is 0"),
        ("rounds = 20", "rounds = 20\ntext_searches = -1", "text_searches is -1"),
        ('open = "<think>"', 'open = "<think>"\nbudget = 0', "budget is 0"),
        ('skip_until = "</think>"', 'skip_until = ""', "no thought would ever end"),
        ('layout = "image_text"', 'role = "tool"', "unknown key 'role'"),
        ('layout = "image_text"', 'layout = "upside down"', "layout 'upside down' is none of"),
        ('open = "<think>"', 'open = ["<think>"]', "open is \\('<think>',\\), which is no str"),
        ('call = ["<tool_call>", "</tool_call>"]', "", "'call' is missing from \\[tool_calls\\]"),
        ('call = ["<tool_call>", "</tool_call>"]', 'call = ["<tool_call>", ""]', "call is"),
        ('call = ["<tool_call>", "</tool_call>"]', 'call = ["a", "b"]\nanswer = ["", ""]', "answer is"),
        ('does = "image_search"', 'does = "dance"', "does 'dance' is none of answer, text_search"),
        ('does = "image_search"', 'does = "answer"', "tool 'image_search' does 'answer'"),
        ('query = "query"', "", "tool 'web_search' does 'text_search'"),
        ('box = "bbox_2d"', 'box = ""', "tool 'image_zoom_in_tool' does 'gaze_search'"),
        ('name = "image_search"', 'name = "web_search"', "name of its own"),
        ('name = "image_search"', 'name = "image_search"\nsize = 3', "unknown key 'size'"),
        ('question = "{question}"', 'question = "What?"', "does not hold {question}"),
        ('question = "{question}"', "", "one of 'question' and 'question_file'"),
        ('question = "{question}"', 'question = "{question}"\nquestion_file = "q.txt"', "one of 'question'"),
        ('question = "{question}"', 'question_file = "none.txt"', "none.txt' cannot be read"),
        ('question = "{question}"', 'question_file = "../q.txt"', "must lie beside the dialect"),
        ('question = "{question}"', 'question_file = "/etc/q.txt"', "must lie beside the dialect"),
        ('question = "{question}"', 'question_file = "decoder.onnx"', "end in"),
        ('give_up = "', 'gave_up = "', "gave_up"),
        ('[answer]\nnot_found = "not in my snapshot"', "", "\\[answer\\]"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(tmp_path, old, new, named):
    path = changed(tmp_path, (old, new))
    with pytest.raises(DialectError, match=named) as caught:
        load_dialect(path)
    assert "mine.toml" in str(caught.value)


def test_a_dialect_without_tools_is_refused(tmp_path):
    path = tmp_path / "mine.toml"
    head, *_ = TEXT.split("[[tool_calls.tools]]")
    for tools in ("", "tools = []\n", "tools = 5\n", 'tools = ["web_search"]\n'):
        path.write_text(head + tools + TEXT[TEXT.index("[crop]") :])
        with pytest.raises(DialectError, match="mine.toml.*tools"):
            load_dialect(path)


def test_a_file_too_large_to_be_a_dialect_is_not_read(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(TEXT + "#" * 2**20)
    with pytest.raises(DialectError, match="no prompt is that long"):
        load_dialect(path)


def test_prompts_may_lie_beside_the_dialect(tmp_path):
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
def test_copies_are_the_same_but_for_the_frame(name, tmp_path):
    dialect, written = copy_dialect(name, tmp_path)
    path = tmp_path / "dialect.toml"
    assert written == ("dialect.toml",) and load_dialect(path) == dialect == load_dialect(name)
    assert path.read_bytes() == (FOLDER / f"{name}.toml").read_bytes()
    moved, _ = copy_dialect(path, tmp_path, "rel1")
    told = dialect.system_prompt.replace("in pixels of the picture", "in shares of the picture's width and height, "
                                         "from 0 to 1") if name == "gog" else dialect.system_prompt
    assert load_dialect(path) == moved == dataclasses.replace(dialect, box_frame="rel1", system_prompt=told)


def test_a_frame_that_cannot_be_replaced_is_not_left_as_it_was(tmp_path):
    path = changed(tmp_path, ('box_frame = "rel1000"', "box_frame = 'rel1000'"))
    with pytest.raises(DialectError, match="write its frame as"):
        copy_dialect(path, tmp_path, "rel1")
    assert not (tmp_path / "dialect.toml").exists()


def test_giving_up_is_a_notice_that_a_dialect_may_lack():
    assert GIVE_UP in load_dialect("qwen_agent").notices and GIVE_UP not in load_dialect("gog").notices
    with pytest.raises(DialectError, match="dialect gog has no notice 'give_up'"):
        load_dialect("gog").render_observation(Observation(notice=GIVE_UP))
