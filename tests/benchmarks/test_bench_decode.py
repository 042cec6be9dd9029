import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from PIL import Image
from rich.console import Console

from benchmarks import bench_decode, bench_episode
from benchmarks.peers.base import WorkerEngine
from benchmarks.peers.checkpoints import gguf_name, text_tensors, write_gguf, write_text_checkpoint
from benchmarks.peers.comparison import CONTEXT, PLAIN, comparison_parser, open_comparison
from benchmarks.peers.registry import PEERS, Workspace, open_peers, parse_environments, parse_names
from benchmarks.peers.session_engine import SessionEngine, bytes_per_token
from benchmarks.peers.workload import QUOTED, Answer, ScriptedConstraint, Writer
from benchmarks.support.resources import read_bandwidth
from gog_edge.errors import BackendError, CheckpointError, InputError
from gog_edge.policy.manifest import DECODER_GRAPH

VOCAB = 320  # of the tiny model, without special tokens


@pytest.fixture
def arguments(policies, tmp_path):
    return ["--policy", str(policies[True]), "--peers", "none", "--scale", "0.1", "--repeats", "1", "--threads", "1",
            "--work", str(tmp_path / "work"), "--out", str(tmp_path / "results")]  # fmt: skip


@pytest.fixture
def text_only(checkpoints, tmp_path):
    write_text_checkpoint(checkpoints[True], tmp_path / "text")
    return tmp_path / "text"


def last_line(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_decoding_is_measured_relative_to_the_bandwidth(arguments, tmp_path, capsys):
    assert bench_decode.main(arguments) == 0
    line = last_line(capsys)
    for key in ("prefill_tok_s", "append_tok_s", "decode_tok_s", "decode_over_limit", "drafted_ratio", "limit_tok_s"):
        assert line[key] > 0
    assert 0 <= line["accepted_share"] <= 1 and line["missing"] == {}
    (written,) = (tmp_path / "results").glob("decode-*.json")
    assert json.loads(written.read_text()) == line
    with Image.open(written.with_suffix(".png")) as picture:
        assert picture.width == 1000


def test_an_episode_is_measured_turn_by_turn(arguments, tmp_path, capsys):
    assert bench_episode.main(arguments) == 0
    line = last_line(capsys)
    assert {"later_turn_over_stateless", "turn4_over_turn2"} <= set(line)
    assert {name: len(parts) for name, parts in line["seconds"].items()} == {
        "ours": 4, "ours, plain": 4, "ours, stateless": 4
    }  # fmt: skip
    assert "later_turn_over_best_peer" not in line
    assert len(list((tmp_path / "results").iterdir())) == 2


def test_a_missing_peer_is_reported(arguments, checkpoints, tmp_path, capsys):
    (tmp_path / "work" / "tiny").mkdir(parents=True)
    (tmp_path / "work" / "tiny" / "checkpoint").symlink_to(checkpoints[True])
    arguments[arguments.index("none")] = "llamacpp"
    assert bench_decode.main([*arguments, "--like", "tiny", "--peer-env", f"llamacpp={tmp_path}"]) == 0
    output = capsys.readouterr().out
    line = json.loads(output.splitlines()[-1])
    assert "'llama-server' was not found" in line["missing"]["llamacpp"] and "missing" in output
    assert "decode_over_llamacpp" not in line


def test_names_and_environments_of_peers_are_parsed():
    known = tuple(PEERS)
    assert parse_names("all", known) == ["llamacpp", "openvino", "transformers"] and parse_names("none", known) == []
    assert parse_names("openvino", known) == ["openvino"]
    with pytest.raises(InputError, match="must be all, none or of llamacpp, openvino, transformers, got 'vllm'"):
        parse_names("openvino,vllm", known)
    assert parse_environments(["openvino=/x"], known) == {"openvino": Path("/x")}
    for wrong in ("openvino", "openvino=", "vllm=/x"):
        with pytest.raises(InputError, match=f"must be NAME=PATH .* got '{wrong}'"):
            parse_environments([wrong], known)


def test_invalid_options_and_policies_are_one_line_errors(arguments, capsys):
    for extra, code in ((["--peer-env", "openvino"], 2), (["--peers", "vllm"], 2), (["--policy", "/nowhere"], 1)):
        assert bench_episode.main([*arguments, *extra]) == code
        error = capsys.readouterr().err.splitlines()
        assert error[-1].startswith("error: ") and all("this machine is busy" in line for line in error[:-1])


def test_all_variants_of_the_session_generate_the_scripted_tokens(tiny_model):
    writer = Writer(3, VOCAB)
    passage = writer.words(60)
    for answer in (writer.quoting(passage, 24), writer.call(24)):
        engines = [SessionEngine("ours", tiny_model), SessionEngine("plain", tiny_model, speculative=False),
                   SessionEngine("stateless", tiny_model, stateless=True)]  # fmt: skip
        for engine in engines:
            engine.turn(passage, Answer(tuple(passage[:3])))
            turn = engine.turn(passage, answer)
            assert turn.generated == 24 and turn.seconds > 0 and turn.decode_tok_s > 0
            assert engine._session.tokens == [*passage, *passage[:3], *passage, *answer.tokens]
            engine.reset()
            assert engine._session.tokens == []
        assert engines[1].drafted == 0


def test_the_scripted_constraint_forces_runs_of_tokens():
    constraint = ScriptedConstraint(Answer((9, 8, 7, 6), frozenset({1, 2})))
    assert constraint.forced_tokens() == ()
    constraint.accept_token(9)
    assert constraint.forced_tokens() == (8, 7)


def test_texts_depend_on_the_seed_and_answers_quote_the_passage():
    assert Writer(1, VOCAB).words(50) == Writer(1, VOCAB).words(50) != Writer(2, VOCAB).words(50)
    writer = Writer(1, 30_000)
    passage = writer.words(300)
    answer = writer.quoting(passage, 400).tokens
    runs = {tuple(passage[n : n + 4]) for n in range(297)}
    quoted = sum(answer[n : n + 4] in runs for n in range(397)) / 397
    assert 0.5 < quoted < QUOTED and len(answer) == 400
    call = writer.call(40)
    assert len(call.tokens) == 40 and len(call.forced) == 20 and max(call.forced) < 40


def test_the_bytes_per_token_are_the_decoders_files_and_its_cache(policies, tiny_model):
    assert read_bandwidth(1, tries=2, size=1 << 22) > 1e7
    weights, with_cache = (bytes_per_token(policies[True], tiny_model, context) for context in (0, 100))
    assert weights == sum(path.stat().st_size for path in policies[True].glob(f"{DECODER_GRAPH}*"))
    session = tiny_model.decoder.engine.session
    caches = [entry for entry in session.get_inputs() if entry.name.startswith("past_")]
    per_token = sum(4 * entry.shape[1] * entry.shape[3] for entry in caches)  # [1, kv_heads, length, head_dim] float32
    assert with_cache - weights == 100 * per_token and len(caches) % 2 == 0


def test_a_text_only_checkpoint_computes_the_same_logits(checkpoints, text_only):
    import torch
    from transformers import AutoModelForCausalLM, Qwen2_5_VLForConditionalGeneration

    tokens = torch.tensor([[300, 5, 70, 261]])
    whole = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoints[True], dtype=torch.float32)
    alone = AutoModelForCausalLM.from_pretrained(text_only, dtype=torch.float32)
    with torch.inference_mode():
        expected, found = whole(input_ids=tokens).logits, alone(input_ids=tokens).logits
    assert float((expected - found).abs().max()) < 1e-4


def test_unsupported_checkpoints_are_refused(tmp_path, checkpoints):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="contains no decoder tensors"):
        write_text_checkpoint(tmp_path, tmp_path / "out")
    (tmp_path / "model.safetensors").symlink_to(next(checkpoints[True].glob("*.safetensors")))
    with pytest.raises(CheckpointError, match="must be one of qwen3_vl, qwen2_5_vl for the peers, got 'llama'"):
        write_text_checkpoint(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_gguf_file_contains_the_same_tensors(tmp_path, checkpoints):
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    assert gguf_name("model.layers.3.self_attn.q_proj.bias") == "blk.3.attn_q.bias"
    with pytest.raises(CheckpointError, match="must be BF16 for the peers"):
        write_gguf(checkpoints[True], tmp_path / "float.gguf")
    whole = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoints[True], dtype=torch.bfloat16)
    whole.save_pretrained(tmp_path / "half")
    (tmp_path / "half" / "tokenizer.json").symlink_to(checkpoints[True] / "tokenizer.json")
    write_gguf(tmp_path / "half", tmp_path / "half.gguf")
    read = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "half.gguf").tensors}
    assert len(read) == len(list(text_tensors(tmp_path / "half")))
    bias = whole.model.language_model.layers[1].self_attn.k_proj.bias.detach().float().numpy()
    assert np.array_equal(read["blk.1.attn_k.bias"].data, bias)
    up = whole.model.language_model.layers[0].mlp.up_proj.weight.detach()
    assert read["blk.0.ffn_up.weight"].data.tobytes() == up.view(torch.uint8).numpy().tobytes()


def test_stored_tensors_equal_those_that_safetensors_reads(text_only):
    from safetensors.numpy import load_file

    expected = load_file(text_only / "model.safetensors")
    found = {one.name: one for one in text_tensors(text_only)}
    assert set(found) == set(expected)
    for name, tensor in found.items():
        assert tensor.shape == expected[name].shape and tensor.read() == expected[name].tobytes()


def test_transformers_runs_in_its_own_process(checkpoints, text_only, tmp_path):
    space = Workspace(tmp_path, threads=1, context=CONTEXT)
    (peer,), missing = open_peers(["transformers"], space)
    assert missing == {} and "bfloat16" in peer.about
    for _ in range(2):
        turn = peer.turn([300, 5, 70], Answer((1, 2, 3)))
        assert turn.generated == 3 and turn.prefill_s > 0 and turn.decode_s > 0
        peer.reset()
    peer.close()


def test_a_worker_that_ends_is_reported_with_its_log(tmp_path):
    arguments = ["/nowhere", "1"]
    with pytest.raises(BackendError, match="its process ended with 1: .*Error"):
        WorkerEngine("transformers", Path(sys.executable), "transformers_worker.py", arguments, tmp_path / "log")
    with pytest.raises(BackendError, match="cannot be run"):
        WorkerEngine("openvino", tmp_path / "python", "openvino_worker.py", [], tmp_path / "log")


def test_tables_include_missing_peers(arguments):
    out = io.StringIO()
    figures = {"ours": dict.fromkeys(bench_decode.METRICS, 25.0), PLAIN: dict.fromkeys(bench_decode.METRICS, 10.0)}
    console = Console(width=120, file=out)
    console.print(bench_decode.as_table(figures, {"openvino": "not here"}))
    seconds = {"ours": [1.0, 2.0, 2.0, 2.0], "llamacpp": [1.0, 4.0, 4.0, 4.0]}
    console.print(bench_episode.as_table(seconds, bench_episode.EPISODE, {"transformers": "not here"}))
    text = out.getvalue()
    assert "25.0 (2.50)" in text and "4.00 (2.00)" in text
    for name in ("openvino", "transformers"):
        (row,) = [line for line in text.splitlines() if name in line]
        assert row.count("missing") in (3, 5)


def test_a_comparison_opens_the_engines_that_are_asked_for(arguments):
    with open_comparison(comparison_parser("").parse_args(arguments), names=("ours",)) as comparison:
        assert [engine.name for engine in comparison.engines] == ["ours"] and comparison.vocab > VOCAB
