"""Pre-train a LLaMA from random weights, look at what it learned, and let it write.

    entrenar prepare stdlib --out corpora/stdlib --vocab-size 4096
    python examples/llama2/train.py --config examples/llama2/configs/tiny.toml --corpus corpora/stdlib

The same as `entrenar train` with the same file. Interrupted, it continues with `--resume` at the very next batch.
"""

import argparse
from pathlib import Path

import entrenar


def main() -> None:
    """Train, measure and generate."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--config", type=Path, default=Path(__file__).parent / "configs" / "tiny.toml")
    arguments.add_argument("--corpus", type=Path, default=Path("corpora/stdlib"))
    arguments.add_argument("--runs-dir", type=Path, default=Path("runs"))
    arguments.add_argument("--steps", type=int, help="instead of the config's")
    arguments.add_argument("--prompt", default="def read(path):")
    arguments.add_argument("--resume", action="store_true")
    parsed = arguments.parse_args()

    # Options are those of the file; what is given here wins.
    options = {"corpus": [parsed.corpus], "runs_dir": parsed.runs_dir}
    if parsed.steps:
        options["max_steps"] = parsed.steps
    planned = entrenar.plan(parsed.config, **options)
    print(f"planned peak {planned.step.peak_bytes / 1e9:.2f} GB")
    run = entrenar.pretrain(parsed.config, resume=parsed.resume, **options)

    # A loss per token depends on the tokenizer; bits per byte can be compared with any other model.
    found = entrenar.evaluate(run.run_dir, parsed.corpus)
    print(f"held-out loss {found.loss:.4f}, {found.bits_per_byte:.3f} bits per byte")

    model, tokenizer = entrenar.load(run.run_dir)
    print(parsed.prompt + entrenar.generate(model, tokenizer, parsed.prompt, max_new_tokens=60, seed=0)[0])
    print(f"trained into {run.run_dir}")


if __name__ == "__main__":
    main()
