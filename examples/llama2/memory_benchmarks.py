"""What full fine-tuning, LoRA and QLoRA take, each in a process of its own: tiny by default, `--preset 124m` to see it.

    python examples/llama2/memory_benchmarks.py [--preset 124m] [--seq-len 512] [--checkpointing full]

Weights are random. `base`, `trained` and `moments` are counted from the tensors; `peak` is the kernel's own figure
(VmHWM) minus what the process had after its imports. On a tiny model libraries outweigh everything that is counted.
`benchmarks/memory.py` measures the whole matrix, with the levers.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

from entrenar.interop.assemble import set_parameter
from entrenar.model import Llama, LlamaConfig
from entrenar.ops import quantize_nf4
from entrenar.peft import LoraConfig, from_base, put_quantized
from entrenar.train import OptimConfig, build_optimizer, return_freed_blocks

# Method, precision of weights and activations, optimizer.
WAYS = {
    "full fp32": ("full", "float32", "adamw"),
    "full bf16": ("full", "bfloat16", "adamw"),
    "full bf16, 8-bit AdamW": ("full", "bfloat16", "adamw8bit"),
    "LoRA fp32": ("lora", "float32", "adamw"),
    "LoRA bf16": ("lora", "bfloat16", "adamw"),
    "QLoRA bf16": ("qlora", "bfloat16", "adamw"),
}


def resident_bytes(name: str) -> int:
    """Return a line of the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def build(preset: str, method: str, precision: str) -> Llama:
    """Return a model of random weights, each drawn and put into the form that it is trained in before the next."""
    generator = torch.Generator().manual_seed(0)
    stored = torch.float32 if method == "full" else getattr(torch, precision)
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
    return model.train()


def measure(way: str, preset: str, seq_len: int, checkpointing: str) -> dict[str, float | str]:
    """Take two steps and say what they took."""
    method, precision, optimizer_name = WAYS[way]
    return_freed_blocks()
    before = resident_bytes("VmRSS")
    model = build(preset, method, precision)
    model.checkpointing = checkpointing
    optimizer = build_optimizer(model.named_parameters(), OptimConfig(optimizer=optimizer_name), precision=precision)
    ids = torch.randint(model.config.vocab_size, (1, seq_len + 1), generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        optimizer.gradients.begin(1)
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step(1e-4, 1 / seq_len)
    tensors = [*model.parameters(), *model.buffers()]
    return {
        "way": way,
        "base": sum(t.nbytes for t in tensors if not t.requires_grad) / 1e6,
        "trained": sum(t.nbytes for t in tensors if t.requires_grad) / 1e6,
        "moments": sum(t.nbytes for t in optimizer.state_dict().values()) / 1e6,
        "peak": (resident_bytes("VmHWM") - before) / 1e6,
        "loss": float(loss.detach()) / seq_len,
    }


def main() -> None:
    """Measure every way in a fresh process and print a table."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--preset", default="tiny")
    arguments.add_argument("--seq-len", type=int, default=128)
    arguments.add_argument("--checkpointing", choices=("none", "selective", "full"), default="full")
    arguments.add_argument("--only", default="", help="the ways whose name holds this")
    arguments.add_argument("--way", choices=WAYS, help="measure this one, in this process")
    parsed = arguments.parse_args()
    if parsed.way:
        print(json.dumps(measure(parsed.way, parsed.preset, parsed.seq_len, parsed.checkpointing)))
        return
    columns = ("base", "trained", "moments", "peak")
    print(f"{parsed.preset}, 1 x {parsed.seq_len} tokens, MB\n{'':24}" + "".join(f"{name:>9}" for name in columns))
    for way in [way for way in WAYS if parsed.only in way]:
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--way", way], stdout=subprocess.PIPE, text=True, check=True
        )
        row = json.loads(done.stdout)
        print(f"{way:24}" + "".join(f"{row[name]:9.1f}" for name in columns))


if __name__ == "__main__":
    main()
