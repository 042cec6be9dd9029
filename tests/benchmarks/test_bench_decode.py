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
from benchmarks.bandwidth import read_bandwidth
from benchmarks.peers.base import Answer, WorkerPeer
from benchmarks.peers.gguf_file import gguf_name, write_gguf
from benchmarks.peers.ours import Ours, Scaffold, bytes_a_token
from benchmarks.peers.registry import Workshop, open_peers, peer_names
from benchmarks.peers.text_only import StoredTensor, text_tensors, write_text_checkpoint
from benchmarks.race import CONTEXT, PLAIN, open_race, race_parser
from benchmarks.workload import QUOTED, Writer
from gog_edge.errors import ArtifactError, BackendError, CheckpointError

VOCAB = 320  # of the tiny model, special tokens left out


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


def test_decoding_is_measured_against_the_memory(arguments, tmp_path, capsys):
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


def test_a_peer_that_is_not_here_is_named(arguments, checkpoints, tmp_path, capsys):
    (tmp_path / "work" / "tiny").mkdir(parents=True)
    (tmp_path / "work" / "tiny" / "checkpoint").symlink_to(checkpoints[True])
    arguments[arguments.index("none")] = "llamacpp"
    where = ["--like", "tiny", "--peer-env", f"llamacpp={tmp_path}"]
    assert bench_decode.main([*arguments, *where]) == 0
    output = capsys.readouterr().out
    line = json.loads(output.splitlines()[-1])
    assert "no 'llama-server'" in line["missing"]["llamacpp"] and "missing" in output
    assert "decode_over_llamacpp" not in line


def test_unknown_peers_and_shapes_are_refused(arguments, capsys):
    assert peer_names("all") == ["llamacpp", "openvino", "transformers"] and peer_names("none") == []
    with pytest.raises(ArtifactError, match="no peer vllm; there are llamacpp"):
        peer_names("openvino,vllm")
    for extra in (["--peer-env", "openvino"], ["--peer-env", "vllm=/x"], ["--policy", "/nowhere"]):
        assert bench_episode.main([*arguments, *extra]) == 1
        assert "error: " in capsys.readouterr().err


def test_ours_says_the_script_however_it_computes(tiny_model):
    writer = Writer(3, VOCAB)
    passage = writer.words(60)
    for answer in (writer.quoting(passage, 24), writer.call(24)):
        kinds = [Ours("ours", tiny_model), Ours("plain", tiny_model, quick=False),
                 Ours("stateless", tiny_model, stateless=True)]  # fmt: skip
        for ours in kinds:
            ours.turn(passage, Answer(tuple(passage[:3])))
            turn = ours.turn(passage, answer)
            assert turn.said == 24 and turn.seconds > 0 and turn.decode_tok_s > 0
            assert ours._session.tokens == [*passage, *passage[:3], *passage, *answer.tokens]
            ours.reset()
            assert ours._session.tokens == []
        assert kinds[1].drafted == 0


def test_what_the_syntax_forces_is_told_in_runs():
    scaffold = Scaffold(Answer((9, 8, 7, 6), frozenset({1, 2})))
    assert scaffold.forced() == ()
    scaffold.accept(9)
    assert scaffold.forced() == (8, 7)


def test_texts_are_drawn_from_a_seed_and_answers_quote():
    assert Writer(1, VOCAB).words(50) == Writer(1, VOCAB).words(50) != Writer(2, VOCAB).words(50)
    writer = Writer(1, 30_000)
    passage = writer.words(300)
    answer = writer.quoting(passage, 400).tokens
    runs = {tuple(passage[n : n + 4]) for n in range(297)}
    quoted = sum(answer[n : n + 4] in runs for n in range(397)) / 397
    assert 0.5 < quoted < QUOTED and len(answer) == 400
    call = writer.call(40)
    assert len(call.tokens) == 40 and len(call.forced) == 20 and max(call.forced) < 40


def test_the_limit_counts_weights_and_the_cache(policies, tiny_model):
    assert read_bandwidth(1, tries=2, size=1 << 22) > 0
    nothing, some = (bytes_a_token(policies[True], tiny_model, context) for context in (0, 100))
    assert nothing > 100_000 and some > nothing


def test_a_text_only_checkpoint_has_the_same_decoder(checkpoints, text_only):
    import torch
    from transformers import AutoModelForCausalLM, Qwen2_5_VLForConditionalGeneration

    tokens = torch.tensor([[300, 5, 70, 261]])
    whole = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoints[True], dtype=torch.float32)
    alone = AutoModelForCausalLM.from_pretrained(text_only, dtype=torch.float32)
    with torch.inference_mode():
        expected, found = whole(input_ids=tokens).logits, alone(input_ids=tokens).logits
    assert float((expected - found).abs().max()) < 1e-4


def test_other_checkpoints_are_refused(tmp_path, checkpoints):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="holds no decoder tensors"):
        write_text_checkpoint(tmp_path, tmp_path / "out")
    (tmp_path / "model.safetensors").symlink_to(next(checkpoints[True].glob("*.safetensors")))
    with pytest.raises(CheckpointError, match="'llama'; peers load qwen3_vl"):
        write_text_checkpoint(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_gguf_holds_the_same_tensors(tmp_path, checkpoints):
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    assert gguf_name("model.layers.3.self_attn.q_proj.bias") == "blk.3.attn_q.bias"
    with pytest.raises(CheckpointError, match="peers are made from BF16"):
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


def test_transformers_runs_in_a_process_of_its_own(checkpoints, text_only, tmp_path):
    shop = Workshop(tmp_path, threads=1, context=CONTEXT)
    (peer,), missing = open_peers(["transformers"], shop)
    assert missing == {} and "bfloat16" in peer.about
    for _ in range(2):
        turn = peer.turn([300, 5, 70], Answer((1, 2, 3)))
        assert turn.said == 3 and turn.prefill_s > 0 and turn.decode_s > 0
        peer.reset()
    peer.close()


def test_a_worker_that_dies_says_why(tmp_path):
    with pytest.raises(BackendError, match="its process ended with 1: .*Error"):
        WorkerPeer("transformers", Path(sys.executable), "transformers_worker.py", ["/nowhere", "1"], tmp_path / "log")
    with pytest.raises(BackendError, match="cannot be run"):
        WorkerPeer("openvino", tmp_path / "python", "openvino_worker.py", [], tmp_path / "log")


def test_tables_show_who_is_missing(arguments):
    out = io.StringIO()
    figures = {name: dict.fromkeys(bench_decode.MEASURES, 10.0) for name in ("ours", PLAIN)}
    console = Console(width=120, file=out)
    console.print(bench_decode.as_table(figures, {"openvino": "not here"}))
    seconds = {"ours": [1.0, 2.0, 2.0, 2.0], "openvino": [1.0, 4.0, 4.0, 4.0]}
    console.print(bench_episode.as_table(seconds, bench_episode.EPISODE, {"llamacpp": "not here"}))
    assert out.getvalue().count("missing") >= 2 and "4.00 (2.00)" in out.getvalue()
    with open_race(race_parser("").parse_args(arguments), names=("ours",)) as race:
        assert [engine.name for engine in race.engines] == ["ours"] and race.vocab > VOCAB


def test_where_tensors_lie(text_only):
    tensors = list(text_tensors(text_only))
    assert tensors and all(isinstance(one, StoredTensor) and one.name.startswith("model.") for one in tensors)
