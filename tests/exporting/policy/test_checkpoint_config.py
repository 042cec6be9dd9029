"""The JSON files of a checkpoint: every layout that transformers has written, and values that are refused."""

import json
import shutil

import pytest
import transformers
from safetensors.numpy import load_file, save_file

from gog_edge.errors import CheckpointError
from gog_edge.exporting.policy.checkpoint import Checkpoint
from gog_edge.exporting.policy.export import export_policy

REMOVED = object()


def edited(checkpoint, folder, name="config.json", section=None, **changes):
    """Copy a checkpoint with changed keys of one of its JSON files; REMOVED deletes one."""
    shutil.copytree(checkpoint, folder)
    path = folder / name
    value = json.loads(path.read_text()) if path.exists() else {}
    target = value if section is None else value.setdefault(section, {})
    for key, change in changes.items():
        target.pop(key, None)
        target |= {} if change is REMOVED else {key: change}
    path.write_text(json.dumps(value))
    return folder


# --- layouts -------------------------------------------------------------------------------------


def flat(config):
    """Rewrite a config as transformers 4.49 does: the decoder's keys at the top, the tower's differences only."""
    text, vision = config.pop("text_config"), config.pop("vision_config")
    rope = text.pop("rope_parameters")
    defaults = transformers.Qwen2_5_VLConfig.sub_configs_defaults["vision_config"].config_class().to_dict()
    reduced = {key: value for key, value in vision.items()
               if json.dumps(value) != json.dumps(defaults.get(key)) and key != "rope_parameters"}  # fmt: skip
    reduced |= {"model_type": "qwen2_5_vl", "in_chans": 3, "spatial_patch_size": 14}
    theta = rope.pop("rope_theta")
    return text | config | {
        "model_type": "qwen2_5_vl", "rope_theta": theta, "vision_config": reduced, "torch_dtype": "bfloat16",
        "rope_scaling": {"mrope_section": rope["mrope_section"], "rope_type": "default", "type": "default"},
        "transformers_version": "4.49.0",
    }  # fmt: skip


def nested_457(config):
    """Rewrite a config as transformers 4.57 does: `rope_scaling` and `rope_theta` in the nested text_config."""
    rope = config["text_config"].pop("rope_parameters")
    config["text_config"] |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope | {"type": "default"}}
    config["vision_config"].pop("rope_parameters", None)
    return config | {"transformers_version": "4.57.0"}


def released(config):
    """Rewrite a config as Qwen published it: rope type "mrope"."""
    config = flat(config)
    return config | {"rope_scaling": {"type": "mrope", "mrope_section": config["rope_scaling"]["mrope_section"]}}


@pytest.mark.parametrize("layout", [flat, nested_457, released])
def test_the_layouts_of_qwen25(checkpoints, tmp_path, layout):
    folder = shutil.copytree(checkpoints[True], tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(layout(config)))
    one, other = Checkpoint.open(folder), Checkpoint.open(checkpoints[True])
    assert one.vision == other.vision and one.text == other.text and one.max_positions == other.max_positions
    assert export_policy(folder, tmp_path / "out", context=512).parity["passed"]


def test_the_layout_of_qwen3_before_transformers_5(qwen3_checkpoints, tmp_path):
    folder = shutil.copytree(qwen3_checkpoints[True], tmp_path / "other")
    config = nested_457(json.loads((folder / "config.json").read_text()))
    config["vision_config"]["model_type"] = "qwen3_vl"
    (folder / "config.json").write_text(json.dumps(config))
    one, other = Checkpoint.open(folder), Checkpoint.open(qwen3_checkpoints[True])
    assert one.vision == other.vision and one.text == other.text
    assert export_policy(folder, tmp_path / "out", context=512).parity["passed"]


@pytest.mark.parametrize("qwen3", [False, True], ids=["qwen2.5", "qwen3"])
def test_missing_keys_have_the_defaults_of_transformers(checkpoints, qwen3_checkpoints, tmp_path, qwen3):
    base = (qwen3_checkpoints if qwen3 else checkpoints)[True]
    folder = edited(base, tmp_path / "other", section="vision_config", patch_size=REMOVED, window_size=REMOVED,
                    spatial_merge_size=REMOVED, temporal_patch_size=REMOVED, hidden_act=REMOVED)  # fmt: skip
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key in ("rms_norm_eps", "max_position_embeddings", "hidden_act", "layer_types"):
        config["text_config"].pop(key, None)
    path.write_text(json.dumps(config))
    checkpoint, library = Checkpoint.open(folder), transformers.AutoConfig.from_pretrained(folder)
    assert checkpoint.vision.patch == library.vision_config.patch_size == (16 if qwen3 else 14)
    assert checkpoint.text.norm_eps == library.text_config.rms_norm_eps == (1e-6 if qwen3 else 1e-5)
    assert checkpoint.max_positions == library.text_config.max_position_embeddings
    assert export_policy(folder, tmp_path / "out", context=512).parity["passed"]


def test_a_null_counts_as_missing(checkpoints, tmp_path):
    folder = edited(checkpoints[True], tmp_path / "other", section="text_config", rope_scaling=None, head_dim=None,
                    sliding_window=None, quantization_config=None)  # fmt: skip
    assert Checkpoint.open(folder).text == Checkpoint.open(checkpoints[True]).text


def test_the_architecture_follows_from_the_model_type(checkpoints, tmp_path):
    folder = edited(checkpoints[True], tmp_path / "other", architectures=REMOVED)
    assert Checkpoint.open(folder).architecture == "Qwen2_5_VLForConditionalGeneration"


def test_a_choice_of_kernels_is_ignored(checkpoints, tmp_path):
    folder = edited(checkpoints[True], tmp_path / "other", _attn_implementation="flash_attention_2",
                    attn_implementation="flash_attention_2")  # fmt: skip
    assert export_policy(folder, tmp_path / "out", context=512).parity["passed"]


# --- values that are refused ---------------------------------------------------------------------


@pytest.mark.parametrize("section, changes, message", [
    ("text_config", {"num_attention_heads": REMOVED}, "has no num_attention_heads"),
    ("text_config", {"num_hidden_layers": "two"}, r"\[text_config\] 'num_hidden_layers' must be an integer, got 'two'"),
    ("text_config", {"num_hidden_layers": 10**30}, "'num_hidden_layers' must be a number of at most 64 bits"),
    ("text_config", {"num_hidden_layers": 10**9}, "'num_hidden_layers' must be at most 1024"),
    ("text_config", {"num_hidden_layers": 0}, "'num_hidden_layers' must be at least 1"),
    ("text_config", {"num_hidden_layers": -3}, "'num_hidden_layers' must be at least 1"),
    ("text_config", {"num_hidden_layers": 3.0}, "'num_hidden_layers' must be an integer"),
    ("text_config", {"num_hidden_layers": True}, "'num_hidden_layers' must be an integer"),
    ("text_config", {"num_hidden_layers": [3]}, "'num_hidden_layers' must be an integer"),
    ("text_config", {"num_hidden_layers": 1000, "layer_types": None}, "has no tensor 'language_model.layers.999"),
    ("text_config", {"num_hidden_layers": 4}, "must be equal to the number of `layer_types`"),
    ("text_config", {"num_attention_heads": 7}, "not a multiple of 7 heads"),
    ("text_config", {"num_key_value_heads": 5}, "num_attention_heads = 6, which is not a multiple of 5 heads"),
    ("text_config", {"num_key_value_heads": 3}, r"k_proj.weight' has shape \[32, 96\], config.json implies \[48, 96\]"),
    ("text_config", {"hidden_size": "wide"}, "'hidden_size' must be an integer"),
    ("text_config", {"rms_norm_eps": "small"}, "'rms_norm_eps' must be a finite number"),
    ("text_config", {"rms_norm_eps": -1}, "'rms_norm_eps' must be greater than 0"),
    ("text_config", {"hidden_act": "relu"}, "hidden_act = 'relu'; this version supports only 'silu'"),
    ("text_config", {"use_sliding_window": True}, "use_sliding_window = True"),
    ("text_config", {"max_position_embeddings": 1e30}, "'max_position_embeddings' must be an integer"),
    ("text_config", {"rope_parameters": []}, "rope_parameters must be an object"),
    ("text_config", {"rope_parameters": {"rope_type": "yarn", "mrope_section": [2, 2, 4], "factor": 4.0}},
     "rope_type = 'yarn'"),
    ("text_config", {"rope_parameters": {"mrope_section": [2, 2, 3]}}, r"mrope_section = \[2, 2, 3\]"),
    ("text_config", {"rope_parameters": {"mrope_section": "224"}}, "'mrope_section' must be a list"),
    ("text_config", {"rope_parameters": {"mrope_section": [2, 2, 4], "rope_theta": "big"}}, "'rope_theta' must be a f"),
    ("vision_config", {"depth": None, "num_heads": "four"}, "'num_heads' must be an integer, got 'four'"),
    ("vision_config", {"num_heads": 3}, "not a multiple of 3 heads"),
    ("vision_config", {"window_size": 100}, "window_size = 100; it must be a multiple of the 28 pixels"),
    ("vision_config", {"patch_size": [14, 14]}, "'patch_size' must be an integer"),
    ("vision_config", {"out_hidden_size": 128}, "out_hidden_size = 128, but the decoder's hidden_size is 96"),
    ("vision_config", {"in_channels": 4}, "in_channels = 4"),
    ("vision_config", {"fullatt_block_indexes": [-1]}, "must be at least 0"),
    (None, {"architectures": "Qwen2_5_VLForConditionalGeneration"}, "architectures must be a list of names"),
    (None, {"architectures": [1]}, "architectures must be a list of names"),
    (None, {"model_type": "qwen3_vl"}, "model_type = 'qwen3_vl', but Qwen2_5_VLForConditionalGeneration is of type"),
    (None, {"architectures": None, "model_type": "llava"}, "has the architecture \\(not given\\)"),
    (None, {"text_config": "qwen"}, "text_config must be an object, got 'qwen'"),
    (None, {"vision_config": [1]}, "vision_config must be an object"),
    (None, {"image_token_id": "image"}, "'image_token_id' must be an integer"),
    (None, {"image_token_id": 5000}, "image_token_id = 5000, but vocab_size = 340"),
    (None, {"quantization_config": {"quant_method": "bitsandbytes"}}, r"already quantized \(bitsandbytes\)"),
    (None, {"quantization_config": "fp8"}, r"already quantized \(fp8\)"),
    ("text_config", {"quantization_config": {"quant_method": "gptq"}}, r"already quantized \(gptq\)"),
    (None, {"tie_word_embeddings": "yes"}, "'tie_word_embeddings' must be true or false"),
])  # fmt: skip
def test_values_of_config_json_are_refused_with_file_and_key(checkpoints, tmp_path, section, changes, message):
    folder = edited(checkpoints[True], tmp_path / "other", section=section, **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("changes, message", [
    ({"deepstack_visual_indexes": [0, 9]}, "deepstack_visual_indexes"),
    ({"deepstack_visual_indexes": [1, 1]}, "deepstack_visual_indexes"),
    ({"num_position_embeddings": 35}, "num_position_embeddings = 35; it must be a square number"),
])  # fmt: skip
def test_values_of_the_tower_of_qwen3(qwen3_checkpoints, tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(edited(qwen3_checkpoints[True], tmp_path / "other", section="vision_config", **changes))


def test_qwen3_without_rope_theta_is_refused(qwen3_checkpoints, tmp_path):
    folder = edited(qwen3_checkpoints[True], tmp_path / "other", section="text_config",
                    rope_parameters={"rope_type": "default", "mrope_section": [6, 5, 5]})  # fmt: skip
    with pytest.raises(CheckpointError, match="has no rope_theta, whose default differs between releases"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("content", ["", "[]", "nonsense", "\x00", '{"a": NaN}', '{"a": 1e999}', '{"a": ' + "[" * 5000])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "preprocessor_config.json"])
def test_files_that_are_not_json_objects_are_refused(checkpoints, tmp_path, name, content):
    folder = shutil.copytree(checkpoints[True], tmp_path / "other")
    (folder / name).write_text(content)
    with pytest.raises(CheckpointError, match=name):
        export_policy(folder, tmp_path / "out", parity=False)


@pytest.mark.parametrize("changes, message", [
    ({"size": [224, 224]}, r"\[size\] must be a table, got \[224, 224\]"),
    ({"size": {"shortest_edge": "3136"}}, "'shortest_edge' must be an integer"),
    ({"max_pixels": "many"}, "'max_pixels' must be an integer, got 'many'"),
    ({"min_pixels": -1}, "'min_pixels' must be at least 1"),
    ({"min_pixels": 10**12}, "'min_pixels' must be at most"),
    ({"min_pixels": 99_999}, "min_pixels = 99999 exceeds max_pixels = 78400"),
    ({"image_mean": 0.5}, "'image_mean' must be a list"),
    ({"image_mean": [0.5, 0.5]}, "'image_mean' must be a list of 3 values"),
    ({"image_std": [0.5, 0, 0.5]}, "must be greater than 0"),
    ({"image_std": ["a", "b", "c"]}, "must be a finite number, got 'a'"),
    ({"patch_size": 16}, "patch_size must be 14 for this model, got 16"),
    ({"merge_size": 4}, "merge_size must be 2"),
    ({"do_normalize": False}, "do_normalize must be true"),
    ({"resample": 2}, "resample must be 3"),
    ({"rescale_factor": 1.0}, "rescale_factor must be 1/255"),
])  # fmt: skip
def test_settings_of_the_image_processor_are_refused_with_file_and_key(checkpoints, tmp_path, changes, message):
    folder = edited(checkpoints[True], tmp_path / "other", "preprocessor_config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        export_policy(folder, tmp_path / "out", parity=False)


def test_settings_of_the_image_processor_in_either_file(checkpoints, tmp_path):
    folder = edited(checkpoints[True], tmp_path / "other", "processor_config.json", section="image_processor",
                    size={"shortest_edge": 6272, "longest_edge": 50_176, "height": None},
                    image_processor_type="Qwen2VLImageProcessor")  # fmt: skip
    vision = Checkpoint.open(folder).vision
    assert (vision.min_pixels, vision.max_pixels, vision.crop_max_pixels) == (6272, 50_176, 50_176)
    other = edited(checkpoints[True], tmp_path / "text", "processor_config.json", image_processor="fast")
    with pytest.raises(CheckpointError, match="image_processor must be an object, got 'fast'"):
        export_policy(other, tmp_path / "out", parity=False)


@pytest.mark.parametrize("changes, message", [
    ({"eos_token_id": "end"}, "eos_token_id must be ids of tokens from 0 to 339, got 'end'"),
    ({"eos_token_id": [5, -1]}, "eos_token_id must be ids of tokens"),
    ({"eos_token_id": [340]}, "eos_token_id must be ids of tokens"),
    ({"eos_token_id": [[5]]}, "eos_token_id must be ids of tokens"),
    ({"temperature": "hot", "do_sample": True}, "'temperature' must be a finite number"),
    ({"top_p": 0}, "'top_p' must be greater than 0"),
    ({"top_p": 1.5}, "'top_p' must be at most 1"),
    ({"top_k": -1}, "'top_k' must be at least 0"),
    ({"repetition_penalty": 0}, "'repetition_penalty' must be greater than 0"),
    ({"do_sample": "yes"}, "'do_sample' must be true or false"),
])  # fmt: skip
def test_settings_of_the_generation_are_refused_with_file_and_key(checkpoints, tmp_path, changes, message):
    folder = edited(checkpoints[True], tmp_path / "other", "generation_config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        export_policy(folder, tmp_path / "out", parity=False)


# --- tokenizer, template, context ----------------------------------------------------------------


@pytest.mark.parametrize("content", ["", "{}", "[]", "{", '{"model": 3}', '{"added_tokens": [{}], "model": null}',
                                     '{"version": "1.0", "model": {"type": "BPE"}}'])  # fmt: skip
def test_a_damaged_tokenizer_is_refused(checkpoints, tmp_path, content):
    folder = shutil.copytree(checkpoints[True], tmp_path / "other")
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json' as a tokenizer"):
        export_policy(folder, tmp_path / "out", parity=False)


def test_a_tokenizer_of_another_model_is_refused(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints[True], tmp_path / "other")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"model.embed_tokens.weight": tensors["model.embed_tokens.weight"][:336].copy()}, path)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] = 336  # one token less than the tokenizer has
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"has a token with the id 336, the model has 336"):
        export_policy(folder, tmp_path / "out", parity=False)


@pytest.mark.parametrize("template, message", [
    ("{{ 1 / 0 }}", "division by zero"), ("{% include 'x' %}", "no loader"), ("{{ [{}] | join }}", "cannot|omits"),
    ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "more than 1 seconds"),
    ("{{ 'a' * 10 ** 10 }}", "multiplies"), ("{{ 9 ** 9 ** 9 }}", "multiplies"), ("{{ '\\ud800' }}", "cannot render"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "cannot render"), ("x" * 2**19, "the limit is"),
])  # fmt: skip
def test_a_template_that_cannot_be_rendered_is_refused(checkpoints, tmp_path, monkeypatch, template, message):
    monkeypatch.setattr("gog_edge.exporting.policy.chat_template.MAX_SECONDS", 1.0)
    folder = shutil.copytree(checkpoints[True], tmp_path / "other")
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(CheckpointError, match=message):
        export_policy(folder, tmp_path / "out", parity=False)


def test_a_template_that_is_not_text_is_refused(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints[True], tmp_path / "other")
    (folder / "chat_template.jinja").write_bytes(b"\xbf\xff")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja' is not UTF-8"):
        export_policy(folder, tmp_path / "out", parity=False)


def test_the_default_of_several_templates_is_used(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints[True], tmp_path / "other")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    named = [{"name": "tools", "template": "{{ 1 / 0 }}"}, {"name": "default", "template": template}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert Checkpoint.open(folder).chat_template == template


@pytest.mark.parametrize("context", [1025, 99_999_999])
def test_a_context_beyond_the_training_is_refused(checkpoints, tmp_path, context):
    with pytest.raises(CheckpointError, match=f"'context' must be at most 1024 tokens, .*got {context}"):
        export_policy(checkpoints[True], tmp_path / "out", context=context, parity=False)


def test_the_context_is_by_default_what_the_checkpoint_was_trained_for(checkpoints, tmp_path):
    assert export_policy(checkpoints[True], tmp_path / "out", parity=False).max_context == 1024


def test_a_context_that_is_too_small_for_the_parity_check_is_told(checkpoints, tmp_path):
    with pytest.raises(CheckpointError, match="do not fit the policy's context of 64 tokens; give a larger --context"):
        export_policy(checkpoints[True], tmp_path / "out", context=64)
    assert export_policy(checkpoints[True], tmp_path / "out", context=64, parity=False).max_context == 64
