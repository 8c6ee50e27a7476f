"""LoRA in a page: a frozen LLaMA, adapters beside its projections, and a file that peft opens.

    python examples/llama2/finetune_lora.py --model DIR --data rows.jsonl --out adapter

DIR is a Hugging Face LLaMA folder with its tokenizer. `entrenar finetune` does the same with checkpoints, resume,
held-out figures and a monitor; this page shows the parts.
"""

import argparse
from itertools import islice
from pathlib import Path

import torch

from entrenar.data import SftConfig, SftLoader, Tokenizer, read_examples
from entrenar.interop import load_model
from entrenar.interop.hf_peft import identify_base, load_adapter, save_adapter
from entrenar.peft import LoraConfig, from_base, set_adapter, trainable_table
from entrenar.train import OptimConfig, build_optimizer


def main() -> None:
    """Train an adapter, write it, and read it back."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", type=Path, required=True)
    arguments.add_argument("--data", type=Path, required=True)
    arguments.add_argument("--out", type=Path, default=Path("adapter"))
    arguments.add_argument("--steps", type=int, default=50)
    arguments.add_argument("--rank", type=int, default=8)
    arguments.add_argument("--lr", type=float, default=1e-3)
    parsed = arguments.parse_args()

    # The base is frozen; B begins at zero, so the first loss is the base's own.
    model, tokenizer = load_model(parsed.model, dtype=torch.float32), Tokenizer.load(parsed.model)
    base = identify_base(model, str(parsed.model))
    lora = LoraConfig(rank=parsed.rank, lora_alpha=2 * parsed.rank, target_modules=("q_proj", "v_proj"))
    from_base(model, lora, torch.Generator().manual_seed(0))
    print(*trainable_table(model).lines(), sep="\n")

    # Rows become examples whose answers are trained, and several examples share a row without seeing each other.
    rows = SftConfig(data=(parsed.data,), seq_len=min(512, model.config.context_length))
    examples = read_examples(rows.data, tokenizer, rows).examples
    loader = SftLoader(examples, batch_size=4, seq_len=rows.seq_len, seed=0)

    optimizer = build_optimizer(model.named_parameters(), OptimConfig(lr=parsed.lr, weight_decay=0.0))
    for step, (batch, _) in enumerate(islice(loader, parsed.steps), start=1):
        optimizer.gradients.begin(1)
        loss = model.loss(batch.input_ids, batch.targets, documents=batch.documents)
        loss.backward()
        optimizer.step(parsed.lr, 1 / batch.num_targets)  # the loss is a sum, divided once
        if step % 10 == 0 or step == 1:
            print(f"step {step}  loss {float(loss.detach()) / batch.num_targets:.4f}")

    # What is written is PEFT's format; read back over a fresh base, it gives the same logits.
    parsed.out.mkdir(parents=True, exist_ok=True)
    save_adapter(parsed.out, model, lora, base=base)
    fresh = load_model(parsed.model, dtype=torch.float32)
    load_adapter(parsed.out, fresh)
    set_adapter(fresh, "default")
    prompt = torch.tensor([tokenizer.encode("Once upon a time")])
    with torch.no_grad():
        difference = (fresh(prompt) - model(prompt)).abs().max()
    print(f"{parsed.out} reads back with logits that differ by {float(difference)}")


if __name__ == "__main__":
    main()
