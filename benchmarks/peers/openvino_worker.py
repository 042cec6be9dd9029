"""OpenVINO GenAI with paged attention and prefix cache: `python openvino_worker.py FOLDER THREADS`, JSON lines.

Self-contained: the Python that runs it need not have gog_edge. Its chat mode (stateful attention) was tried as well,
but takes twice as long to append, so the prefix cache represents OpenVINO.
"""

import json
import sys
import time

import numpy as np
import openvino
import openvino_genai

CACHE_GB = 1
BATCH = 4096  # largest number of tokens prefilled in one step


class Conversation:
    """A pipeline and all tokens so far; the pipeline finds the known ones in its cache."""

    def __init__(self, folder: str, threads: int) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = True
        scheduler.cache_size = CACHE_GB
        scheduler.max_num_batched_tokens = BATCH
        self.pipeline = openvino_genai.LLMPipeline(
            folder, "CPU", scheduler_config=scheduler, INFERENCE_NUM_THREADS=threads
        )
        self.history: list[int] = []

    def turn(self, tokens: list[int], generate: int) -> dict[str, float]:
        """Append tokens, then generate `generate` tokens."""
        self.history += tokens
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = generate, True, False
        ids = np.array([self.history], np.int64)
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        started = time.perf_counter()
        result = self.pipeline.generate(inputs, config)
        seconds = time.perf_counter() - started
        self.history += result.tokens[0]
        first = result.perf_metrics.get_ttft().mean / 1e3
        return {"prefill_s": first, "decode_s": seconds - first, "generated": len(result.tokens[0])}


def main() -> None:
    """Answer requests until the input ends."""
    folder, threads = sys.argv[1:]
    conversation = Conversation(folder, int(threads))
    conversation.turn(list(range(64)), 2)
    conversation.history.clear()
    about = f"openvino-genai {openvino_genai.__version__}, int4 symmetric group 128, paged attention, prefix cache"
    print(json.dumps({"about": about}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if request.get("reset"):
            conversation.history.clear()
            print("{}", flush=True)
        else:
            print(json.dumps(conversation.turn(request["tokens"], request["generate"])), flush=True)


if __name__ == "__main__":
    main()
