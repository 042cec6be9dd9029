import json

import pytest
from tokenizers import Tokenizer

from atlas.policy.batches import CHAT
from atlas.policy.tokenizer import SPECIAL, dialect_tags, save_tokenizer
from gog_edge.exporting.policy.chat_template import CHATML


@pytest.fixture
def tokenizer(tokenizer_file):
    return Tokenizer.from_file(str(tokenizer_file))


def test_numbers_are_single_tokens(tokenizer):
    ids = [tokenizer.encode(str(n)).ids for n in range(1000)]
    assert all(len(one) == 1 for one in ids) and len({one[0] for one in ids}) == 1000
    box = tokenizer.encode("[7,14,252,196]").tokens
    assert [token for token in box if token.isdigit()] == ["7", "14", "252", "196"] and len(box) == 9


def test_tags_are_single_tokens_in_any_context(tokenizer, dialect):
    assert len(dialect_tags(dialect)) == 11
    for mark in dialect_tags(dialect):
        (token,) = tokenizer.encode(mark).ids
        assert tokenizer.encode(f"x{mark}y").ids.count(token) == 1
        assert tokenizer.decode([token], skip_special_tokens=True) == mark  # visible to the parser of the dialect


def test_special_tokens_are_not_produced_by_text(tokenizer):
    for name in SPECIAL:
        tokenizer.encode_special_tokens = False
        assert tokenizer.encode(name).ids == [tokenizer.token_to_id(name)]
        tokenizer.encode_special_tokens = True
        ids = tokenizer.encode(name).ids
        assert tokenizer.token_to_id(name) not in ids and tokenizer.decode(ids) == name


@pytest.mark.parametrize("text", ["The capital of Peru is Lima.", "Größe,\n\t日本 🇯🇵 1,285,220 km²  x", "", "\x00é"])
def test_any_text_is_decoded_unchanged(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_ids_are_contiguous_within_the_vocabulary_size(tokenizer):
    assert 1500 < tokenizer.get_vocab_size() <= 2048
    assert sorted(tokenizer.get_vocab().values()) == list(range(tokenizer.get_vocab_size()))


def test_a_saved_tokenizer_has_the_files_of_a_checkpoint(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path)
    saved = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert saved.encode("Lima 12").ids == tokenizer.encode("Lima 12").ids
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == "<|im_end|>"
    assert (tmp_path / "chat_template.jinja").read_text() == CHATML


def test_the_chat_template_equals_the_training_format():
    from gog_edge.exporting.policy.chat_template import extract_chat_format

    assert extract_chat_format(CHATML, image_token="<|image_pad|>", eos="<|im_end|>") == CHAT
