"""Valid files of every kind that the product reads, small enough that each is read in milliseconds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import closing
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gog_edge.bundle import DEFAULT_BUNDLE
from gog_edge.files import describe_files, write_array, write_json
from gog_edge.policy.dialect.loader import copy_dialect, shipped

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
WORDS = ("red", "green", "blue", "flag", "of", "the")
DIM = 16


def write_bundle(folder: Path) -> None:
    """Copy the atlas."""
    shutil.copytree(DEFAULT_BUNDLE, folder)


def write_text_encoder(folder: Path) -> None:
    """Write a sentence encoder whose hidden states are the rows of a table."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    folder.mkdir(parents=True)
    table = np.random.default_rng(0).normal(size=(len(WORDS) + 2, DIM)).astype(np.float32)
    inputs = ("input_ids", "attention_mask")
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "input_ids"], ["last_hidden_state"])], "text",
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["n", "tokens"]) for name in inputs],
        [helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, ["n", "tokens", DIM])],
        [numpy_helper.from_array(table, "table")],
    )  # fmt: skip
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), folder / "model.onnx"
    )
    tokenizer = Tokenizer(
        WordLevel({word: row for row, word in enumerate(("[PAD]", "[UNK]", *WORDS))}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    text = {"max_tokens": 12, "pad_id": 0, "inputs": list(inputs), "pooling": "mean", "normalize": True,
            "query_prefix": "", "passage_prefix": ""}  # fmt: skip
    write_json(
        folder / "manifest.json",
        {
            "schema": 1,
            "kind": "text_encoder",
            "name": "words",
            "dim": DIM,
            "text": text,
            "precision": "fp32",
            "parity": None,
            "weights_sha256": sha256(table.tobytes()).hexdigest(),
            "preprocessing_sha256": sha256(repr(text).encode()).hexdigest(),
            "files": [entry.to_json() for entry in describe_files(folder, ["model.onnx", "tokenizer.json"])],
        },
    )


def write_engines(folder: Path) -> None:
    """Write a bundle of two graphs with an engine manifest, as `gog-edge export engines` does."""
    from gog_edge.engines.manifest import IMAGE, MANIFEST, TEXT, BuiltGraph, EngineManifest

    encoder, engines = folder / "encoder", folder / "engines" / "ort-cuda"
    shutil.copytree(DEFAULT_BUNDLE / "encoder", encoder)
    engines.mkdir(parents=True)
    (engines / "text.onnx").write_bytes(b"text" * 100)
    (engines / "image.onnx").write_bytes(b"image" * 100)
    hashes = {entry["path"]: entry["sha256"] for entry in json.loads((encoder / "manifest.json").read_bytes())["files"]}
    graphs = tuple(
        BuiltGraph(
            name,
            f"{name}.onnx",
            {f"encoder/{name}.onnx": hashes[f"{name}.onnx"]},
            profiles=({"tokens": ((1, 32), (8, 32), (16, 32))},),
            layers={"MATMUL": 4},
        )
        for name in (IMAGE, TEXT)
    )
    files = tuple(describe_files(engines, ["image.onnx", "text.onnx"]))
    write_json(engines / MANIFEST, EngineManifest("ort-cuda", "", (), 0, graphs, {"passed": True}, files).to_json())


def write_indexes(folder: Path) -> None:
    """Write vectors of a pack, and FAISS indexes of every supported type over them."""
    import faiss

    folder.mkdir(parents=True)
    vectors = np.random.default_rng(0).normal(size=(640, DIM)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    write_array(folder / "vectors.npy", vectors.astype(np.float16))
    write_array(folder / "ids.npy", np.arange(1, len(vectors) + 1))
    for name, factory in {
        "flat": "Flat",
        "sq": "SQfp16",
        "ivf": "IVF8,Flat",
        "ivfsq": "IVF8,SQfp16",
        "ivfpq": "IVF8,PQ4x4fs",
        "hnsw": "HNSW8,SQfp16",
    }.items():
        index = faiss.index_factory(DIM, factory, faiss.METRIC_INNER_PRODUCT)
        index.train(vectors)
        index.add(vectors)
        faiss.write_index(index, str(folder / f"{name}.faiss"))


def write_qwen25(folder: Path) -> None:
    """Write a Qwen2.5-VL checkpoint of one layer in two shards, with a LoRA adapter."""
    from gog_edge.exporting.policy.random_checkpoint import ModelShape
    from gog_edge.exporting.torchvision_shim import import_torchvision

    import_torchvision()
    from transformers import Qwen2_5_VLConfig

    config = Qwen2_5_VLConfig(
        vision_config={"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 32,
                       "window_size": 112, "fullatt_block_indexes": [1]},
        text_config={"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
                     "num_key_value_heads": 1, "vocab_size": 4096, "max_position_embeddings": 1024,
                     "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
        tie_word_embeddings=False, **_token_ids(),
    )  # fmt: skip
    processor = {"min_pixels": 3136, "max_pixels": 78_400, "patch_size": 14, "merge_size": 2, "temporal_patch_size": 2,
                 "image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # fmt: skip
    _write_checkpoint(folder / "checkpoint", ModelShape(config, processor), shards=2)
    _write_adapter(folder / "adapter")


def write_qwen3(folder: Path) -> None:
    """Write a Qwen3-VL checkpoint of one layer in one file."""
    from gog_edge.exporting.policy.random_checkpoint import ModelShape
    from gog_edge.exporting.torchvision_shim import import_torchvision

    import_torchvision()
    from transformers import Qwen3VLConfig

    config = Qwen3VLConfig(
        vision_config={"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 32,
                       "patch_size": 16, "num_position_embeddings": 36, "deepstack_visual_indexes": [0]},
        text_config={"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
                     "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 4096, "max_position_embeddings": 1024,
                     "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2],
                                         "mrope_interleaved": True}},
        tie_word_embeddings=True, **_token_ids(),
    )  # fmt: skip
    processor = {"size": {"shortest_edge": 65_536, "longest_edge": 16_777_216}, "patch_size": 16, "merge_size": 2,
                 "temporal_patch_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # fmt: skip
    _write_checkpoint(folder / "checkpoint", ModelShape(config, processor), shards=1)


def _token_ids() -> dict[str, int]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(DEFAULT_BUNDLE / "policy" / "tokenizer.json"))
    image, start, end = (tokenizer.token_to_id(SPECIAL[number]) for number in (4, 2, 3))
    return {
        "image_token_id": image,
        "video_token_id": image,
        "vision_start_token_id": start,
        "vision_end_token_id": end,
    }


def _write_checkpoint(folder: Path, shape: Any, *, shards: int) -> None:
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.normal(0, 0.02, tuple(tensor.shape)).astype(np.float32) for name, tensor in shape.tensors().items()
    }
    names = sorted(tensors)
    weight_map = {}
    for number in range(shards):
        part = names[number::shards]
        file = "model.safetensors" if shards == 1 else f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        size = sum(tensor.nbytes for tensor in tensors.values())
        write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map}
        )
    config = json.loads(shape.config.to_json_string(use_diff=False)) | {"architectures": [shape.architecture.__name__]}
    write_json(folder / "config.json", config)
    write_json(folder / "preprocessor_config.json", shape.processor)
    write_json(
        folder / "generation_config.json",
        {
            "eos_token_id": [2, 0],
            "do_sample": True,
            "temperature": 0.7,
            "top_p": 0.8,
            "top_k": 20,
            "repetition_penalty": 1.05,
        },
    )
    for name in ("tokenizer.json", "chat_template.jinja"):
        shutil.copyfile(DEFAULT_BUNDLE / "policy" / name, folder / name)
    template = (folder / "chat_template.jinja").read_text()
    write_json(folder / "tokenizer_config.json", {"chat_template": template, "model_max_length": 1024})


def _write_adapter(folder: Path) -> None:
    from peft import LoraConfig
    from safetensors.numpy import save_file

    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], base_model_name_or_path="base",
                        rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 8})  # fmt: skip
    config.save_pretrained(str(folder))
    rng = np.random.default_rng(1)
    prefix = "base_model.model.model.language_model.layers.0.self_attn"
    save_file({f"{prefix}.{module}.lora_{side}.weight": rng.normal(size=size).astype(np.float32)
               for module, out in (("q_proj", 32), ("v_proj", 16)) for side, size in (("A", (2, 32)), ("B", (out, 2)))},
              folder / "adapter_model.safetensors", metadata={"format": "pt"})  # fmt: skip


def write_clip(folder: Path) -> None:
    """Write an open_clip checkpoint of one layer."""
    from gog_edge.exporting.torchvision_shim import import_torchvision

    import_torchvision()
    from open_clip.model import CLIP
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    settings = {
        "embed_dim": 8,
        "vision_cfg": {"layers": 1, "width": 16, "head_width": 8, "patch_size": 8, "image_size": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 49_408, "width": 16, "heads": 2, "layers": 1},
    }
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    write_json(folder / "open_clip_config.json", {"model_cfg": settings, "preprocess_cfg": preprocess})
    save_file(CLIP(**settings).state_dict(), folder / "open_clip_model.safetensors")


def write_sentences(folder: Path) -> None:
    """Write the text files of a sentence-transformers folder; its weights are empty."""
    files = {
        "modules.json": [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
                         {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}],
        "config.json": {"model_type": "bert", "hidden_size": 16, "vocab_size": 4096, "max_position_embeddings": 64,
                        "pad_token_id": 0, "architectures": ["BertModel"]},
        "sentence_bert_config.json": {"max_seq_length": 32, "do_lower_case": False},
        "config_sentence_transformers.json": {"prompts": {"query": "query: "}, "default_prompt_name": None,
                                              "similarity_fn_name": "cosine"},
        "tokenizer_config.json": {"model_max_length": 512},
        "1_Pooling/config.json": {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True,
                                  "pooling_mode_cls_token": False},
    }  # fmt: skip
    (folder / "1_Pooling").mkdir(parents=True)
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value, indent=2))
    shutil.copyfile(DEFAULT_BUNDLE / "policy" / "tokenizer.json", folder / "tokenizer.json")
    (folder / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")


# --- snapshots ----------------------------------------------------------------------------------


def write_pictures(folder: Path) -> None:
    """Write a museum's folder: pictures with a CSV, a TSV and a JSON table, and texts beside pictures."""
    folder.mkdir(parents=True)
    for number in range(6):
        Image.new("RGB", (40, 30), (40 * number, 90, 200)).save(folder / f"vase_{number}.png")
    (folder / "objects.csv").write_text(
        "file,title,caption,text,licence,attribution\n"
        + "".join(
            f'vase_{number}.png,Vase {number},A vase,"A vase, made in {1700 + number}.",CC0,Museum\n'
            for number in range(3)
        )
    )
    (folder / "more.tsv").write_text("file\ttitle\ttext\nvase_3.png\tVase 3\tA blue vase.\n")
    (folder / "rest.json").write_text(
        json.dumps([{"file": "vase_4.png", "title": "Vase 4", "text": "A vase.", "licence": "CC0"}])
    )
    (folder / "vase_5.txt").write_text("Vase 5\n\nA vase of glass.\n")


def write_wit(folder: Path) -> None:
    """Write a file of WIT, its rows of two pages."""
    columns = (
        "language",
        "page_url",
        "image_url",
        "page_title",
        "section_title",
        "hierarchical_section_title",
        "caption_reference_description",
        "caption_attribution_description",
        "caption_alt_text_description",
        "mime_type",
        "is_main_image",
        "attribution_passes_lang_id",
        "context_page_description",
        "context_section_description",
    )
    rows = [("en", f"https://en.wikipedia.org/wiki/Page_{n // 2}", f"http://upload.wikimedia.org/a/Image_{n}.jpg",
             f"Page {n // 2}", "Uses", f"Page {n // 2} / Uses", f"Image {n}", "By us", "", "image/jpeg",
             "true" if n % 2 else "false", "true", "A page about something.", f"Used with image {n}.")
            for n in range(4)]  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "wit.tsv").write_text("".join("\t".join(row) + "\n" for row in (columns, *rows)))


def write_wiki6m(folder: Path) -> None:
    """Write pages of Wiki6M."""
    folder.mkdir(parents=True)
    pages = [
        {
            "wikidata_id": f"Q{n}",
            "wikipedia_title": f"Thing {n}",
            "wikipedia_summary": f"Thing {n} is.",
            "wikipedia_content": f"Thing {n} is.\n\nIt has parts.",
            "wikipedia_image_url": f"https://x.org/Thing_{n}.jpg",
        }
        for n in range(4)
    ]
    (folder / "Wiki6M_ver_1_0.jsonl").write_text("".join(json.dumps(page) + "\n" for page in pages))


def write_encyclopedic_vqa(folder: Path) -> None:
    """Write a knowledge base of Encyclopedic VQA."""
    folder.mkdir(parents=True)
    pages = {
        f"https://en.wikipedia.org/wiki/Bird_{n}": {
            "title": f"Bird {n}",
            "url": f"https://en.wikipedia.org/wiki/Bird_{n}",
            "section_titles": [f"Bird {n}", "Habitat"],
            "section_texts": [f"Bird {n} is a bird.", "It lives in woods."],
            "image_urls": [f"https://x.org/Bird_{n}.jpg"],
            "image_reference_descriptions": ["In a tree"],
            "image_section_indices": [0],
        }
        for n in range(4)
    }
    (folder / "encyclopedic_kb_wiki.json").write_text(json.dumps(pages))


_SITE = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="en">
  <siteinfo><sitename>Wikipedia</sitename><dbname>enwiki</dbname><base>https://en.wikipedia.org/wiki/Main_Page</base>
    <case>first-letter</case><namespaces><namespace key="-2" case="first-letter">Media</namespace>
      <namespace key="0" case="first-letter" /><namespace key="6" case="first-letter">File</namespace>
      <namespace key="10" case="first-letter">Template</namespace>
      <namespace key="14" case="first-letter">Category</namespace></namespaces></siteinfo>
"""
_PAGE = """  <page><title>{title}</title><ns>0</ns><id>{number}</id>{redirect}
    <revision><id>{number}</id><timestamp>2024-01-01T00:00:00Z</timestamp><model>wikitext</model>
      <format>text/x-wiki</format><text bytes="300" xml:space="preserve">{{{{Infobox town|name=Town}}}}
'''{title}''' is a town on the [[Elbe|river Elbe]].&lt;ref&gt;Book.&lt;/ref&gt; It is {{{{convert|9|km}}}} from it.

[[File:Town.jpg|thumb|A [[view]]]]
== History ==
Founded in {{{{circa|1200}}}}, {{{{formatnum:12345}}}} people.
* First
{{| class="wikitable"
| a || b
|}}
[[Category:Towns]]</text></revision></page>
"""


def write_mediawiki(folder: Path) -> None:
    """Write a dump of three articles and a redirect."""
    folder.mkdir(parents=True)
    pages = [
        _PAGE.format(title=f"Town {n}", number=n, redirect='<redirect title="Town 0" />' if n == 3 else "")
        for n in range(4)
    ]
    (folder / "enwiki-20240101-pages-articles.xml").write_text(_SITE + "".join(pages) + "</mediawiki>\n")


def _write_dialect(name: str, folder: Path) -> None:
    folder.mkdir(parents=True)
    copy_dialect(name, folder)


def write_trace(folder: Path) -> None:
    """Write the trace of an answered question."""
    from gog_edge.agent.trace import TraceWriter
    from gog_edge.runtime import open_runtime

    picture = (DEFAULT_BUNDLE / "samples" / "one.jpg").read_bytes()
    with (
        closing(open_runtime(DEFAULT_BUNDLE, threads=1)) as runtime,
        TraceWriter(folder / "episode.trace.json") as trace,
    ):
        runtime.answer(picture, "What is the capital of this country?", lambda _: None, trace=trace)


SEEDS: dict[str, Callable[[Path], None]] = {
    **{f"dialect-{name}": partial(_write_dialect, name) for name in shipped()},
    "trace": write_trace,
    "bundle": write_bundle,
    "text_encoder": write_text_encoder,
    "engines": write_engines,
    "indexes": write_indexes,
    "qwen25": write_qwen25,
    "qwen3": write_qwen3,
    "clip": write_clip,
    "sentences": write_sentences,
    "pictures": write_pictures,
    "wit": write_wit,
    "wiki6m": write_wiki6m,
    "encyclopedic_vqa": write_encyclopedic_vqa,
    "mediawiki": write_mediawiki,
}
