"""QLoRA in a page: a LLaMA whose projections are held in four bits, adapters beside them, and two ways to merge.

    python examples/llama2/finetune_qlora.py --model DIR --data rows.jsonl --out adapter

DIR is a Hugging Face LLaMA folder with its tokenizer, plain or in four bits already. `entrenar finetune --method qlora`
does the same with checkpoints, resume, held-out figures and a monitor; this page shows the parts.
"""

import argparse
from itertools import islice
from pathlib import Path

import torch

from entrenar.data import SftConfig, SftLoader, Tokenizer, read_examples
from entrenar.interop import load_model
from entrenar.interop.hf_peft import identify_base, load_adapter, save_adapter
from entrenar.model import Llama
from entrenar.ops import fastest_compute_dtype
from entrenar.peft import LoraConfig, from_base, memory_lines, merge, set_adapter, trainable_table
from entrenar.train import OptimConfig, build_optimizer


def open_base(folder: Path) -> Llama:
    """Quantize each projection while it is read; the rest stays in bfloat16, and products take the fastest dtype."""
    model = load_model(folder, dtype=torch.bfloat16, quantize=True)
    model.set_compute_dtype(fastest_compute_dtype(torch.bfloat16, torch.device("cpu")))
    return model


@torch.no_grad()
def difference(one: Llama, other: Llama, prompt: torch.Tensor) -> float:
    """Return the largest difference of a logit."""
    return float((one(prompt) - other(prompt)).abs().max())


def main() -> None:
    """Train an adapter over four bits, write it, read it back, and merge it."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", type=Path, required=True)
    arguments.add_argument("--data", type=Path, required=True)
    arguments.add_argument("--out", type=Path, default=Path("adapter"))
    arguments.add_argument("--steps", type=int, default=50)
    arguments.add_argument("--lr", type=float, default=1e-3)
    parsed = arguments.parse_args()

    # The hash of the base is that of its codes and scales: the adapter belongs to them.
    model, tokenizer = open_base(parsed.model), Tokenizer.load(parsed.model)
    base = identify_base(model, str(parsed.model))
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    lora = LoraConfig(rank=8, lora_alpha=16, target_modules=targets)
    from_base(model, lora, torch.Generator().manual_seed(0))
    print(*memory_lines(model), *trainable_table(model).lines(), sep="\n")

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

    # Read back over the same four bits, the adapter gives the same logits; merged, it is rounded once to bfloat16.
    parsed.out.mkdir(parents=True, exist_ok=True)
    save_adapter(parsed.out, model, lora, base=base)
    fresh, prompt = open_base(parsed.model), torch.tensor([tokenizer.encode("Once upon a time")])
    load_adapter(parsed.out, fresh)
    set_adapter(fresh, "default")
    print(f"{parsed.out} reads back with logits that differ by {difference(fresh, model, prompt)}")
    merge(fresh)
    print(f"merged into widened weights they differ by {difference(fresh, model, prompt):.3g}")


if __name__ == "__main__":
    main()
