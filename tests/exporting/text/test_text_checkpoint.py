"""What a sentence encoder's folder says, and folders that cannot be exported. Needs no torch."""

import json

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from gog_edge.errors import CheckpointError
from gog_edge.exporting.text.checkpoint import TextCheckpoint, TextOptions

CONFIG = {"model_type": "bert", "hidden_size": 32, "max_position_embeddings": 128, "vocab_size": 50, "pad_token_id": 0}
TYPES = "sentence_transformers.models."


def put(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def plain(folder, **config):
    """A transformers folder; its weights are never read here."""
    put(folder / "config.json", CONFIG | config)
    (folder / "model.safetensors").write_bytes(b"weights")
    Tokenizer(WordLevel({"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]")).save(str(folder / "tokenizer.json"))
    return folder


def sentence_transformers(folder, pooling=None, modules=("Transformer", "Pooling", "Normalize"), **files):
    plain(folder)
    paths = ("", "1_Pooling", "2_Normalize", "3_Other")
    put(folder / "modules.json", [{"idx": n, "name": str(n), "path": paths[n], "type": TYPES + kind}
                                  for n, kind in enumerate(modules)])  # fmt: skip
    put(folder / "1_Pooling" / "config.json", pooling or {"pooling_mode_mean_tokens": True})
    for name, value in files.items():
        put(folder / f"{name}.json", value)
    return folder


def test_a_sentence_transformers_folder_says_it_all(tmp_path):
    folder = sentence_transformers(
        tmp_path / "e5", config_sentence_transformers={"prompts": {"query": "query: ", "passage": "passage: "}},
        sentence_bert_config={"max_seq_length": 64, "do_lower_case": True},
    )  # fmt: skip
    found = TextCheckpoint.open(folder)
    assert (found.name, found.dim, found.max_tokens, found.pooling) == ("e5", 32, 64, "mean")
    assert (found.query_prefix, found.passage_prefix, found.lower_case) == ("query: ", "passage: ", True)


@pytest.mark.parametrize(("config", "pooling"), [
    ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
    ({"pooling_mode": "mean", "embedding_dimension": 32}, "mean"),
])  # fmt: skip
def test_pooling_is_read_in_either_form(tmp_path, config, pooling):
    assert TextCheckpoint.open(sentence_transformers(tmp_path, config)).pooling == pooling


def test_a_plain_folder_needs_the_pooling_told(tmp_path):
    with pytest.raises(CheckpointError, match="its pooling is unknown; give --pooling mean"):
        TextCheckpoint.open(plain(tmp_path))
    found = TextCheckpoint.open(plain(tmp_path), TextOptions(name="bge", pooling="cls", query_prefix="Find: "))
    assert (found.name, found.pooling, found.query_prefix, found.passage_prefix) == ("bge", "cls", "Find: ", "")


@pytest.mark.parametrize(("prompts", "wanted"), [
    ({"query": "q: ", "document": "d: ", "passage": "p: "}, ("q: ", "d: ")),
    ({"query": "q: "}, ("q: ", "")),
    ({}, ("", "")),
])  # fmt: skip
def test_prompts_are_found_by_sentence_transformers_names(tmp_path, prompts, wanted):
    found = TextCheckpoint.open(sentence_transformers(tmp_path, config_sentence_transformers={"prompts": prompts}))
    assert (found.query_prefix, found.passage_prefix) == wanted


def test_a_default_prompt_stands_before_both(tmp_path):
    said = {"prompts": {"any": "Represent: "}, "default_prompt_name": "any"}
    found = TextCheckpoint.open(sentence_transformers(tmp_path, config_sentence_transformers=said))
    assert (found.query_prefix, found.passage_prefix) == ("Represent: ", "Represent: ")


def test_an_e5_folder_without_prompts_asks_for_them(tmp_path):
    folder = sentence_transformers(tmp_path / "e5-small-v2")
    with pytest.raises(CheckpointError, match="--query-prefix 'query: '"):
        TextCheckpoint.open(folder)
    found = TextCheckpoint.open(folder, TextOptions(query_prefix="query: ", passage_prefix="passage: "))
    assert found.query_prefix == "query: "
    assert TextCheckpoint.open(folder, TextOptions(query_prefix="", passage_prefix="")).query_prefix == ""


@pytest.mark.parametrize(("config", "limits", "wanted"), [
    ({}, {}, 128),
    ({}, {"model_max_length": 100}, 100),
    ({}, {"model_max_length": 10**30}, 128),
    ({"model_type": "xlm-roberta", "max_position_embeddings": 130, "pad_token_id": 1}, {}, 128),
])  # fmt: skip
def test_tokens_of_a_text_are_the_least_that_is_said(tmp_path, config, limits, wanted):
    put(plain(tmp_path, **config) / "tokenizer_config.json", limits)
    assert TextCheckpoint.open(tmp_path, TextOptions(pooling="mean")).max_tokens == wanted


def test_max_tokens_beyond_the_positions_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="--max-tokens must be from 4 to 128 for the model in .*, got 512"):
        TextCheckpoint.open(plain(tmp_path), TextOptions(pooling="mean", max_tokens=512))


def test_shards_are_hashed_together(tmp_path):
    folder = plain(tmp_path)
    alone = TextCheckpoint.open(folder, TextOptions(pooling="mean")).weights_sha256
    put(folder / "model.safetensors.index.json", {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}})
    for name in ("1", "2"):
        (folder / f"{name}.safetensors").write_bytes(name.encode())
    found = TextCheckpoint.open(folder, TextOptions(pooling="mean"))
    assert [path.name for path in found.weights] == ["1.safetensors", "2.safetensors"]
    assert found.weights_sha256 != alone


def refused(folder, said, options=None):
    with pytest.raises(CheckpointError) as error:
        TextCheckpoint.open(folder, options)
    assert said in str(error.value)


def test_missing_files_are_named_with_what_to_do(tmp_path):
    options = TextOptions(pooling="mean")
    refused(tmp_path, "config.json", options)
    (plain(tmp_path) / "tokenizer.json").unlink()
    refused(tmp_path, "has no tokenizer.json; write it with transformers", options)
    (plain(tmp_path) / "model.safetensors").unlink()
    refused(tmp_path, "weights are read from safetensors files only", options)


@pytest.mark.parametrize(("config", "said"), [
    ({"model_type": "t5"}, "got 't5'"),
    ({"auto_map": {"AutoModel": "own.Model"}}, "never run"),
    ({"vocab_size": 1}, "vocab_size in config.json is 1; copy the tokenizer"),
    ({"hidden_size": "wide"}, "hidden_size must be a positive integer, got 'wide'"),
    ({"hidden_size": True}, "hidden_size must be a positive integer, got True"),
    ({"hidden_size": 10**30}, "hidden_size must be at most"),
    ({"pad_token_id": "pad"}, "pad_token_id must be the id of a token below 50, got 'pad'"),
    ({"pad_token_id": 50}, "pad_token_id must be the id of a token below 50, got 50"),
    ({"max_position_embeddings": 3}, "limits texts to 3 tokens"),
    ({"max_position_embeddings": None}, "max_position_embeddings must be a positive integer, got None"),
])  # fmt: skip
def test_networks_that_cannot_be_exported_are_refused(tmp_path, config, said):
    refused(plain(tmp_path / "model", **config), said, TextOptions(pooling="mean"))


@pytest.mark.parametrize(("pooling", "said"), [
    ({"pooling_mode_max_tokens": True}, "got max_tokens"),
    ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "got cls, mean"),
    ({"pooling_mode_mean_tokens": False}, "got none"),
    ({"pooling_mode": "lasttoken"}, "got lasttoken"),
    ({"pooling_mode_mean_tokens": True, "include_prompt": False}, "include_prompt must be true"),
])  # fmt: skip
def test_other_poolings_are_refused(tmp_path, pooling, said):
    refused(sentence_transformers(tmp_path, pooling), said)


def test_what_contradicts_the_folder_is_refused(tmp_path):
    refused(sentence_transformers(tmp_path), "--pooling is 'cls', but", TextOptions(pooling="cls"))
    refused(plain(tmp_path / "plain"), "--pooling must be mean or cls, got 'max'", TextOptions(pooling="max"))


def test_modules_beyond_pooling_and_normalising_are_refused(tmp_path):
    refused(sentence_transformers(tmp_path, modules=("Transformer", "Pooling", "Dense")), "Transformer, Pooling, Dense")
    put(tmp_path / "modules.json", {"not": "a list"})
    refused(tmp_path, "must hold a list of objects")
    (tmp_path / "modules.json").write_text("[")
    refused(tmp_path, "as JSON")


@pytest.mark.parametrize(("index", "said"), [
    ({"weight_map": {"a": "pytorch_model.bin"}}, "weights are read from safetensors files only"),
    ({"weight_map": {"a": "../model.safetensors"}}, "is outside of it"),
    ({"weight_map": {"a": 7}}, "weight_map must map"),
    ({"weight_map": []}, "weight_map must map"), ({}, "weight_map must map"), ({"weight_map": {}}, "has no"),
])  # fmt: skip
def test_a_damaged_index_is_refused(tmp_path, index, said):
    put(plain(tmp_path) / "model.safetensors.index.json", index)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    refused(tmp_path, said, TextOptions(pooling="mean"))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": NaN}', '{"a": 1e999}', "[" * 5000])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "modules.json"])
def test_damaged_files_are_refused(tmp_path, name, content):
    (plain(tmp_path) / name).write_text(content)
    refused(tmp_path, name, TextOptions(pooling="mean"))


def test_modules_outside_the_folder_are_refused(tmp_path):
    folder = sentence_transformers(tmp_path / "model")
    put(folder / "modules.json", [{"path": "", "type": TYPES + "Transformer"},
                                  {"path": "../1_Pooling", "type": TYPES + "Pooling"}])  # fmt: skip
    refused(folder, "is outside of it")


def test_inner_products_without_normalising_are_refused(tmp_path):
    said = {"similarity_fn_name": "dot"}
    folder = sentence_transformers(tmp_path, modules=("Transformer", "Pooling"), config_sentence_transformers=said)
    refused(folder, "compares vectors by 'dot' without normalising them")
    put(folder / "config_sentence_transformers.json", {"prompts": ["query: "]})
    refused(folder, "prompts must be strings by name")
