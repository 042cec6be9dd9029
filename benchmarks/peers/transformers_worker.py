"""transformers in bfloat16 with a persistent DynamicCache: `python transformers_worker.py FOLDER THREADS`, JSON lines.

Self-contained: the Python that runs it need not have gog_edge. A plain greedy loop has less overhead than `generate`.
"""

import json
import sys
import time
from contextlib import suppress

with suppress(ImportError):  # an environment with open_clip may have a torchvision that does not match its torch
    from gog_edge.exporting.torchvision_shim import import_torchvision

    import_torchvision()

import torch
import transformers


class Conversation:
    """A model and its cache."""

    def __init__(self, folder: str) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        self.model.train(False)
        self.reset()

    def reset(self) -> None:
        """Start a new conversation."""
        self.cache = transformers.DynamicCache()
        self.pending: list[int] = []

    def turn(self, tokens: list[int], generate: int) -> dict[str, float]:
        """Append tokens, then generate `generate` tokens."""
        started = time.perf_counter()
        token = self.step(self.pending + tokens)
        ready = time.perf_counter()
        for _ in range(generate - 1):
            token = self.step([token])
        self.pending = [token]
        return {"prefill_s": ready - started, "decode_s": time.perf_counter() - ready, "generated": generate}

    @torch.inference_mode()
    def step(self, tokens: list[int]) -> int:
        """Return the most likely token after these."""
        output = self.model(torch.tensor([tokens]), past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return int(output.logits[0, -1].argmax())


def main() -> None:
    """Answer requests until the input ends."""
    folder, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    conversation = Conversation(folder)
    conversation.turn(list(range(64)), 2)
    about = f"transformers {transformers.__version__}, torch {torch.__version__}, bfloat16, persistent DynamicCache"
    print(json.dumps({"about": about}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if request.get("reset"):
            conversation.reset()
            print("{}", flush=True)
        else:
            print(json.dumps(conversation.turn(request["tokens"], request["generate"])), flush=True)


if __name__ == "__main__":
    main()
