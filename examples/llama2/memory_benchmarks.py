"""What full fine-tuning, LoRA and QLoRA take, each in a process of its own: tiny by default, `--preset 124m` to see it.

    python examples/llama2/memory_benchmarks.py [--preset 124m] [--seq-len 512]

Weights are random; all but `peak` is counted from the tensors. `peak` is the kernel's VmHWM since the imports.
"""

import argparse
import json
import subprocess
import sys

import torch

from entrenar.interop.assemble import set_parameter
from entrenar.model import Llama, LlamaConfig
from entrenar.ops import quantize_nf4
from entrenar.peft import LoraConfig, from_base, put_quantized
from entrenar.planning import status_bytes
from entrenar.train import OptimConfig, build_optimizer, return_freed_blocks

WAYS = {
    "full fp32": ("full", "float32", "adamw"), "full bf16": ("full", "bfloat16", "adamw"),
    "full bf16, 8-bit AdamW": ("full", "bfloat16", "adamw8bit"), "LoRA fp32": ("lora", "float32", "adamw"),
    "LoRA bf16": ("lora", "bfloat16", "adamw"), "QLoRA bf16": ("qlora", "bfloat16", "adamw"),
}  # fmt: skip


def build(preset: str, method: str, precision: str) -> Llama:
    """Return a model of random weights, each drawn and put into the form that it is trained in before the next."""
    generator, stored = torch.Generator().manual_seed(0), getattr(torch, "float32" if method == "full" else precision)
    with torch.device("meta"):
        model = Llama(LlamaConfig.preset(preset))
    for name, shape in [(name, parameter.shape) for name, parameter in model.named_parameters()]:
        weight = torch.ones(shape) if "norm" in name else 0.02 * torch.randn(shape, generator=generator)
        if method == "qlora" and name.endswith("_proj.weight"):
            put_quantized(model, name.removesuffix(".weight"), quantize_nf4(weight), stored)
        else:
            set_parameter(model, name, weight.to(stored))
    if method != "full":
        from_base(model, LoraConfig(rank=8, lora_alpha=16), generator)
    model.checkpointing = "full"
    return model.train()


def measure(method: str, precision: str, name: str, preset: str, seq_len: int) -> dict[str, int]:
    """Take two steps and return what they took, in bytes."""
    return_freed_blocks()
    before, model = status_bytes("VmRSS"), build(preset, method, precision)
    optimizer = build_optimizer(model.named_parameters(), OptimConfig(optimizer=name), precision=precision)
    ids = torch.randint(model.config.vocab_size, (1, seq_len + 1), generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        optimizer.gradients.begin(1)
        model.loss(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step(1e-4, 1 / seq_len)
    base, trained = (sum(p.nbytes for p in model.parameters() if p.requires_grad == has) for has in (False, True))
    base += sum(buffer.nbytes for buffer in model.buffers())
    sizes = base, trained, sum(t.nbytes for t in optimizer.state_dict().values()), status_bytes("VmHWM") - before
    return dict(zip(("base", "trained", "moments", "peak"), sizes, strict=True))


def main() -> None:
    """Measure every way in a fresh process and print a table."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--preset", default="tiny")
    arguments.add_argument("--seq-len", type=int, default=128)
    arguments.add_argument("--only", default="", help="the ways whose name holds this")
    arguments.add_argument("--way", choices=WAYS, help="measure this one, in this process")
    parsed = arguments.parse_args()
    if parsed.way:
        print(json.dumps(measure(*WAYS[parsed.way], parsed.preset, parsed.seq_len)))
    for way in [way for way in WAYS if parsed.only in way and not parsed.way]:
        row = json.loads(subprocess.check_output([sys.executable, __file__, *sys.argv[1:], "--way", way], text=True))
        print(f"{way:24}" + "".join(f"{name:>10} {value / 1e6:,.1f} MB" for name, value in row.items()))


if __name__ == "__main__":
    main()
