"""Greedy decoding, ours against transformers' `generate`, in turns in one run; and how a token's cost grows.

    python benchmarks/decode.py [--stories ../shared/data/models/stories260K_hf] [--rounds 5] [--threads 1]

Cases: the trained stories260K and the tiny preset with random weights, batch 1 and 16, float32. A prompt of 16 tokens,
192 new ones, no end token; both must choose the same tokens. Growth: the tiny preset stretched to 4096 positions, the
cost of a token after prompts of 128 … 3968, prefill not counted. Seconds of the CPU (one thread) are given beside the
clock's, because other work on the machine moves only the clock's.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import turns

PROMPT, NEW, GROWTH_NEW = 16, 192, 64
CONTEXTS = (128, 1024, 3968)
STORIES = Path(__file__).parents[2] / "shared" / "data" / "models" / "stories260K_hf"


def make_tiny(folder: Path, **changes: Any) -> None:
    import torch

    from entrenar.interop import save_model
    from entrenar.model import Llama, LlamaConfig

    config = LlamaConfig.preset("tiny", **changes)
    model = Llama(config)
    model.init_weights(torch.Generator().manual_seed(0))
    folder.mkdir()
    save_model(folder, config, model.state_dict())


def prompt_of(vocab_size: int, batch_size: int, length: int) -> Any:
    import torch

    return torch.randint(3, vocab_size, (batch_size, length), generator=torch.Generator().manual_seed(1))


def serve_ours(folder: Path, batch_size: int, length: int, new: int) -> None:
    from entrenar.infer import GenerateConfig, generate
    from entrenar.interop import load_model

    model = load_model(folder)
    prompts = prompt_of(model.config.vocab_size, batch_size, length).tolist()
    config = GenerateConfig(max_new_tokens=new, temperature=0, eos_token_ids=())

    def decode() -> dict[str, Any]:
        started, cpu_started = time.perf_counter(), time.process_time()
        stamps, tokens = [], []
        for step in generate(model, prompts, config):
            tokens.append(step[0])
            stamps.append(time.process_time())
        return {
            "elapsed_s": time.perf_counter() - started,
            "cpu_s": stamps[-1] - cpu_started,
            "cpu_after_first_s": stamps[-1] - stamps[0],
            "tokens": tokens,
        }

    turns.serve(decode)


def serve_transformers(folder: Path, batch_size: int, length: int, new: int) -> None:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.generation.streamers import BaseStreamer

    class Stamps(BaseStreamer):
        def __init__(self) -> None:
            self.stamps: list[float] = []

        def put(self, _: Any) -> None:
            self.stamps.append(time.process_time())

        def end(self) -> None:
            pass

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = prompt_of(model.config.vocab_size, batch_size, length)
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "use_cache": True, "pad_token_id": 0}

    def decode() -> dict[str, Any]:
        streamer = Stamps() if batch_size == 1 else None  # transformers streams one row only
        started, cpu_started = time.perf_counter(), time.process_time()
        ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), streamer=streamer, **options)
        elapsed_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
        after_first_s = streamer.stamps[-1] - streamer.stamps[1] if streamer else None
        tokens = ids[0, length:].tolist()
        return {"elapsed_s": elapsed_s, "cpu_s": cpu_s, "cpu_after_first_s": after_first_s, "tokens": tokens}

    turns.serve(decode)


def measure(folder: Path, parsed: argparse.Namespace, batch_size: int, length: int, new: int) -> dict[str, Any]:
    shared = ["--folder", str(folder), "--case", f"{batch_size},{length},{new}", "--threads", str(parsed.threads)]
    workers = [turns.Worker(name, [__file__, "--worker", name, *shared]) for name in ("ours", "transformers")]
    return turns.in_turns(workers, parsed.rounds, warmup=1)


def compare(answers: dict[str, list[dict[str, Any]]], batch_size: int) -> dict[str, Any]:
    elapsed = {name: [answer["elapsed_s"] for answer in found] for name, found in answers.items()}
    cpu = {name: [answer["cpu_s"] for answer in found] for name, found in answers.items()}
    return {
        "tokens_per_s": {name: round(batch_size * NEW / statistics.median(times)) for name, times in elapsed.items()},
        "speed_over_transformers": round(turns.median_ratio(elapsed["transformers"], elapsed["ours"]), 2),
        "cpu_us_per_step": {name: round(statistics.median(times) / NEW * 1e6) for name, times in cpu.items()},
        "cpu_speed_over_transformers": round(turns.median_ratio(cpu["transformers"], cpu["ours"]), 2),
        "same_tokens": answers["ours"][0]["tokens"] == answers["transformers"][0]["tokens"],
        "raw_elapsed_s": elapsed,
    }


def cpu_us_per_token(answers: list[dict[str, Any]]) -> float:
    return round(statistics.median(answer["cpu_after_first_s"] for answer in answers) / (GROWTH_NEW - 1) * 1e6, 1)


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--stories", type=Path, default=STORIES)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--worker")
    arguments.add_argument("--folder", type=Path)
    arguments.add_argument("--case")
    parsed = arguments.parse_args()

    import torch

    torch.set_num_threads(parsed.threads)
    if parsed.worker:
        serve = {"ours": serve_ours, "transformers": serve_transformers}[parsed.worker]
        serve(parsed.folder, *map(int, parsed.case.split(",")))
        return
    result: dict[str, Any] = {
        **turns.machine(),
        "prompt": PROMPT,
        "new_tokens": NEW,
        "cases": {},
        "cpu_us_per_token": {},
    }
    with tempfile.TemporaryDirectory() as place:
        tiny, long = Path(place) / "tiny", Path(place) / "long"
        make_tiny(tiny)
        make_tiny(long, max_seq_len=4096)
        folders = {"tiny preset": tiny} | ({"stories260K": parsed.stories} if parsed.stories.is_dir() else {})
        for name, folder in folders.items():
            for batch_size in (1, 16):
                answers = measure(folder, parsed, batch_size, PROMPT, NEW)
                result["cases"][f"{name}, batch {batch_size}"] = compare(answers, batch_size)
        for context in CONTEXTS:
            answers = measure(long, parsed, 1, context, GROWTH_NEW)
            result["cpu_us_per_token"][context] = {who: cpu_us_per_token(found) for who, found in answers.items()}
    print(turns.write_result("decode", result).read_text())


if __name__ == "__main__":
    main()
