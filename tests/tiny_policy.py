"""Fixtures: tiny random Qwen2.5-VL and Qwen3-VL checkpoints and their exports, created once per test run."""

import json
from functools import cache
from pathlib import Path

import pytest

TEMPLATE = """\
{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string %}{{ message.content }}
{%- else %}
{%- for part in message.content %}
{%- if part.type == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}{% else %}{{ part.text }}{% endif %}
{%- endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
            "<|video_pad|>")
CORPUS = ("Which country's flag is the second from the left, and what is its currency? Größe, naïve, 日本 🇯🇵 "
          "<answer>France</answer> <text_search>the capital of Peru</text_search> box 12 34 56 78 90 ") * 3
MIN_PIXELS, MAX_PIXELS, CROP_PIXELS = 3136, 78_400, 12_544


def write_tokenizer(folder: Path):
    """Train and save a small byte-level BPE tokenizer with the special tokens of Qwen."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([CORPUS], trainer)
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def write_checkpoint(folder: Path, *, tied: bool, qwen3: bool = False, wide: bool = False) -> Path:
    """Write a random checkpoint with grouped queries and all files that an export reads.

    Qwen2.5-VL has window attention, Qwen3-VL deepstack features. `wide`: heads of 64, as the native operators require.
    """
    from gog_edge.exporting.torchvision_shim import import_torchvision

    import_torchvision()
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen3VLForConditionalGeneration
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder.mkdir(parents=True)
    tokenizer = write_tokenizer(folder)
    ids = {name: tokenizer.token_to_id(name) for name in SPECIALS}
    torch.manual_seed(7)
    config = (qwen3_config if qwen3 else qwen25_config)(tied, tokenizer.get_vocab_size() + 3, ids, wide)
    model = (Qwen3VLForConditionalGeneration if qwen3 else Qwen2_5_VLForConditionalGeneration)(config).eval()
    with torch.no_grad():  # large enough weights that attention and positions affect the logits
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.mul_(6.0)
            elif name.endswith("bias"):
                weight.normal_(0, 0.1)
            else:
                weight.mul_(1 + 0.2 * torch.randn(len(weight)))
    model.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    pixels = {"min_pixels": MIN_PIXELS, "max_pixels": MAX_PIXELS, "crop_max_pixels": CROP_PIXELS}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [ids["<|im_end|>"], 0]}))
    return folder


def qwen25_config(tied: bool, vocab: int, ids: dict[str, int], wide: bool):
    from transformers import Qwen2_5_VLConfig

    hidden = 192 if wide else 96 if tied else 64
    heads = {"num_attention_heads": hidden // (64 if wide else 16), "num_key_value_heads": 1 if wide else 2}
    sections = [8, 12, 12] if wide else [2, 2, 4] if tied else [2, 3, 3]
    return Qwen2_5_VLConfig(
        vision_config={"depth": 3, "hidden_size": 64, "num_heads": 4, "intermediate_size": 96,
                       "out_hidden_size": hidden, "window_size": 112, "fullatt_block_indexes": [1]},
        text_config={"hidden_size": hidden, "intermediate_size": 80, "num_hidden_layers": 2 + tied,
                     **heads, "vocab_size": vocab, "max_position_embeddings": 1024, "rms_norm_eps": 1e-6,
                     "bos_token_id": None, "eos_token_id": ids["<|im_end|>"],
                     "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections}},
        tie_word_embeddings=tied, **image_ids(ids),
    )


def qwen3_config(tied: bool, vocab: int, ids: dict[str, int], wide: bool):
    from transformers import Qwen3VLConfig

    head_dim, fed, sections = (64, 96, [12, 10, 10]) if wide else (32, 80, [6, 5, 5])
    vocab += -vocab % 64 if wide else 0  # then all weights fill whole blocks and panels, unlike those of Qwen2.5-VL
    return Qwen3VLConfig(
        vision_config={"depth": 4, "hidden_size": 64, "num_heads": 4, "intermediate_size": 96, "out_hidden_size": 64,
                       "patch_size": 16, "num_position_embeddings": 36, "deepstack_visual_indexes": [0, 2]},
        text_config={"hidden_size": 64, "intermediate_size": fed, "num_hidden_layers": 3, "num_attention_heads": 4,
                     "num_key_value_heads": 2, "head_dim": head_dim, "vocab_size": vocab,
                     "max_position_embeddings": 1024, "rms_norm_eps": 1e-6, "bos_token_id": None,
                     "eos_token_id": ids["<|im_end|>"],
                     "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections,
                                         "mrope_interleaved": True}},
        tie_word_embeddings=tied, **image_ids(ids),
    )


def image_ids(ids: dict[str, int]) -> dict[str, int]:
    return {"image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|video_pad|>"],
            "vision_start_token_id": ids["<|vision_start|>"], "vision_end_token_id": ids["<|vision_end|>"]}


@cache
def _checkpoints(base: Path) -> dict[bool, Path]:
    return {tied: write_checkpoint(base / "checkpoints" / f"tied-{tied}", tied=tied) for tied in (True, False)}


@cache
def _policies(base: Path) -> dict[bool, Path]:
    from gog_edge.exporting.policy.export import export_policy

    out = {tied: base / "policies" / f"tied-{tied}" for tied in (True, False)}
    for tied, checkpoint in _checkpoints(base).items():
        export_policy(checkpoint, out[tied], context=1024)
    return out


@cache
def _qwen3(base: Path) -> dict[bool, Path]:
    return {tied: write_checkpoint(base / "qwen3" / f"tied-{tied}", tied=tied, qwen3=True) for tied in (True, False)}


@cache
def _qwen3_policy(base: Path) -> Path:
    from gog_edge.exporting.policy.export import export_policy

    export_policy(_qwen3(base)[False], base / "policies" / "qwen3", context=1024)
    return base / "policies" / "qwen3"


@cache
def _wide(base: Path) -> dict[bool, Path]:
    return {qwen3: write_checkpoint(base / "wide" / f"qwen3-{qwen3}", tied=qwen3, qwen3=qwen3, wide=True)
            for qwen3 in (False, True)}  # fmt: skip


@cache
def _native_policies(base: Path) -> dict[bool, Path]:
    from gog_edge.exporting.policy.export import export_policy

    out = {qwen3: base / "policies" / f"native-{qwen3}" for qwen3 in (False, True)}
    for qwen3, checkpoint in _wide(base).items():
        export_policy(checkpoint, out[qwen3], precision="int4", block=32, context=512)
    return out


@cache
def _model(folder: Path):
    from gog_edge.policy.model import PolicyModel

    return PolicyModel.open(folder, threads=1)


# The cached functions build on each other; the fixtures below expose them.


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[bool, Path]:
    """Qwen2.5-VL checkpoints, by whether the head is tied."""
    return _checkpoints(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def policies(tmp_path_factory) -> dict[bool, Path]:
    """Exported Qwen2.5-VL policy folders, by whether the head is tied; read-only."""
    return _policies(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def qwen3_checkpoints(tmp_path_factory) -> dict[bool, Path]:
    """Qwen3-VL checkpoints, by whether the head is tied."""
    return _qwen3(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def qwen3_policy(tmp_path_factory) -> Path:
    """An exported Qwen3-VL policy folder; read-only."""
    return _qwen3_policy(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def wide_checkpoints(tmp_path_factory) -> dict[bool, Path]:
    """Checkpoints with heads of 64, by whether it is Qwen3-VL: groups of two query heads there, of three otherwise."""
    return _wide(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def native_policies(tmp_path_factory) -> dict[bool, Path]:
    """The wide checkpoints exported in int4 with native graphs, by whether it is Qwen3-VL; read-only."""
    return _native_policies(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def tiny_model(policies):
    """The Qwen2.5-VL policy with a tied head, open on one thread."""
    return _model(policies[True])
