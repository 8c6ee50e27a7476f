"""`entrenar eval MODEL --corpus DIR`."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from entrenar.cli import flags


def run(words: Sequence[str]) -> int:
    """Evaluate; return the exit code."""
    arguments = flags.parser("eval", "Measure a model on the held-out split of a corpus.")
    arguments.add_argument("model", type=Path, help="a run, a checkpoint, a model folder, a .gguf or a .bin")
    arguments.add_argument("--corpus", type=Path, required=True, help="a corpus prepared with the model's tokenizer")
    arguments.add_argument("--batch-size", type=flags.positive, default=8, help="windows at once (default: 8)")
    arguments.add_argument("--seq-len", type=flags.positive, help="tokens in a window (default: the model's context)")
    arguments.add_argument("--threads", type=flags.thread_count, help="CPU threads")
    arguments.add_argument("--json", action="store_true", help="print JSON")
    parsed = flags.parse(arguments, words)
    import torch  # noqa: PLC0415  # seconds, which neither --help nor a usage error needs

    from entrenar import recipe  # noqa: PLC0415
    from entrenar.cli.train import describe  # noqa: PLC0415

    if parsed.threads:
        torch.set_num_threads(parsed.threads)
    result = recipe.evaluate_model(parsed.model, parsed.corpus, batch_size=parsed.batch_size, seq_len=parsed.seq_len)
    if parsed.json:
        print(json.dumps(asdict(result)))
    else:
        print(f"{describe(result)}   over {result.num_targets:,} tokens")
    return 0
