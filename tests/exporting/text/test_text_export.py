"""Export of sentence encoders through optimum: model types, poolings, folders of sentence-transformers, errors.

It is skipped where the extra `text` is not installed; there test_text_environment.py runs it in another environment.
"""

import json

import numpy as np
import pytest

pytest.importorskip("optimum.exporters.onnx", reason="the extra 'text' is installed in an environment of its own")

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel

from export.export_text import main
from gog_edge.errors import CheckpointError
from gog_edge.exporting.text.checkpoint import MODEL_TYPES, TextOptions
from gog_edge.exporting.text.encoder import export_text_encoder
from gog_edge.retrieval.text.encoder import TextEncoder

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 64,
         "max_position_embeddings": 66, "pad_token_id": 1}  # fmt: skip
OWN = {
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    "electra": {"embedding_size": 32},
    "albert": {"embedding_size": 32},
    "modernbert": {"global_attn_every_n_layers": 2, "local_attention": 16, "bos_token_id": 2, "eos_token_id": 3,
                   "cls_token_id": 2, "sep_token_id": 3},
}  # fmt: skip


def write_model(folder, model_type="bert", seed=0, **tokenizer_config):
    """Write a random network with a tokenizer of letters."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **(SMALL | OWN.get(model_type, {})))
    AutoModel.from_config(config).save_pretrained(folder)
    letters = "abcdefghijklmnopqrstuvwxyz0123456789?:,."
    special = ("[UNK]", "[PAD]", "[CLS]", "[SEP]")
    vocabulary = {token: row for row, token in enumerate((*special, *letters))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(),
                                                       pre_tokenizers.Split("", "isolated")])  # fmt: skip
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "unk_token": "[UNK]", **tokenizer_config,
    }))  # fmt: skip
    return folder


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method")  # ModernBERT brings torch.compile in
@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_every_model_type_keeps_its_vectors(tmp_path, model_type, pooling):
    folder = write_model(tmp_path / "model", model_type)
    options = TextOptions(pooling=pooling, query_prefix="query: ", passage_prefix="passage: ")
    manifest = export_text_encoder(folder, tmp_path / "out", options)
    assert manifest["parity"]["min_cosine"] >= 0.999999
    assert manifest["model_type"] == model_type and manifest["text"]["pooling"] == pooling
    encoder = TextEncoder.open(tmp_path / "out")
    vectors = encoder.embed_queries(["what is it?", "a", ""])
    assert vectors.shape == (3, 32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-6)


def test_a_sentence_transformers_folder_is_exported_with_its_pooling_and_prompts(tmp_path):
    folder = write_model(tmp_path / "e5-tiny")
    types = "sentence_transformers.models."
    modules = [{"path": "", "type": f"{types}Transformer"}, {"path": "1_Pooling", "type": f"{types}Pooling"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    (folder / "config_sentence_transformers.json").write_text(
        json.dumps({"prompts": {"query": "query: ", "document": "passage: "}})
    )
    manifest = export_text_encoder(folder, tmp_path / "out")
    assert (manifest["name"], manifest["text"]["pooling"]) == ("e5-tiny", "mean")
    encoder, network = TextEncoder.open(tmp_path / "out"), AutoModel.from_pretrained(folder).eval()
    for embed, prefix in ((encoder.embed_queries, "query: "), (encoder.embed_passages, "passage: ")):
        ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(prefix + "what is it?").ids
        with torch.inference_mode():
            mean = network(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(dim=0).numpy()
        vectors = embed(["what is it?", "a much longer text, so that the first one is padded"])
        np.testing.assert_allclose(vectors[0], mean / np.linalg.norm(mean), atol=1e-5)


def test_the_same_folder_gives_the_same_manifest_but_for_the_graph(tmp_path):
    folder = write_model(tmp_path / "model")
    one, two = (export_text_encoder(folder, tmp_path / name, TextOptions(pooling="mean")) for name in ("one", "two"))
    same = ("weights_sha256", "preprocessing_sha256", "dim", "text", "name")
    assert [one[key] for key in same] == [two[key] for key in same]
    other = export_text_encoder(folder, tmp_path / "three", TextOptions(pooling="cls"))
    assert other["preprocessing_sha256"] != one["preprocessing_sha256"]


def test_lower_casing_of_sentence_transformers_goes_into_the_tokenizer(tmp_path):
    folder = write_model(tmp_path / "model")
    (folder / "sentence_bert_config.json").write_text(json.dumps({"do_lower_case": True}))
    export_text_encoder(folder, tmp_path / "out", TextOptions(pooling="mean"))
    encoder = TextEncoder.open(tmp_path / "out")
    np.testing.assert_array_equal(encoder.embed_queries(["FRANCE"]), encoder.embed_queries(["france"]))


def test_the_graph_tells_nothing_of_this_machine(tmp_path):
    export_text_encoder(write_model(tmp_path / "model"), tmp_path / "out", TextOptions(pooling="mean"))
    graph = (tmp_path / "out" / "model.onnx").read_bytes()
    assert b"site-packages" not in graph and str(tmp_path).encode() not in graph
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["manifest.json", "model.onnx", "tokenizer.json"]


def test_the_command_writes_a_text_encoder(tmp_path, capsys):
    out = tmp_path / "out"
    assert main([str(write_model(tmp_path / "model")), str(out), "--pooling", "cls", "--query-prefix", "query: ",
                 "--name", "letters", "--max-tokens", "16"]) == 0  # fmt: skip
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (line["name"], line["dim"], line["text"]["pooling"]) == ("letters", 32, "cls")
    assert TextEncoder.open(out).spec.query_prefix == "query: "
    assert main([str(tmp_path / "none"), str(out)]) == 1 and capsys.readouterr().err.startswith("error: ")


def test_vectors_that_differ_are_refused_and_nothing_is_kept(tmp_path, monkeypatch):
    folder = write_model(tmp_path / "model")
    monkeypatch.setattr("gog_edge.retrieval.text.encoder.pool", lambda hidden, mask, pooling: hidden[:, -1])
    with pytest.raises(CheckpointError, match=r"must be at least 0.9999, got"):
        export_text_encoder(folder, tmp_path / "out", TextOptions(pooling="mean"))
    assert not (tmp_path / "out").exists()


def test_missing_weights_are_refused_by_name(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = write_model(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"has no weight 'encoder.layer.1.output.dense.weight'"):
        export_text_encoder(folder, tmp_path / "out", TextOptions(pooling="mean"))


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path):
    from safetensors.numpy import load_file, save_file

    path = write_model(tmp_path / "model") / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("attention.self.query.weight"))
    tensors[name][1, 2] = np.nan
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"'{name}' has values that are NaN or infinite"):
        export_text_encoder(path.parent, tmp_path / "out", TextOptions(pooling="mean"))
    assert not (tmp_path / "out").exists()


def test_damaged_weights_are_refused(tmp_path):
    folder = write_model(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot load .* check that the folder is complete"):
        export_text_encoder(folder, tmp_path / "out", TextOptions(pooling="mean"))


def test_another_folder_is_not_overwritten(tmp_path):
    folder = write_model(tmp_path / "model")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="text_encoder"):
        export_text_encoder(folder, tmp_path / "out", TextOptions(pooling="mean"))
    assert (tmp_path / "out" / "letter.txt").read_text() == "mine"
