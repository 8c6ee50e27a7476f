"""Write a LLaMA of any size with random weights, tensor by tensor: for time and memory, not for what it says.

    python benchmarks/make_llama.py 7b DIR --to nf4        3.9 GB; the bfloat16 model (13.5 GB) never exists
    python benchmarks/make_llama.py 1b DIR --to bf16
    python benchmarks/make_llama.py 1b DIR --to nf4 --embedding int8       also nf4; the head like it
    python benchmarks/make_llama.py 1b DIR --to bits        3.9 bits a weight; each matrix is in memory in its few bits

Weights are normal with deviation 0.02, rows differing by a factor of about 1.3, as in published LLaMAs; norms are one.
Each tensor's numbers follow from its name, so that both layouts hold the same model.
"""

import argparse
import sys
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from entrenar.data import Tokenizer
from entrenar.interop.assemble import set_parameter
from entrenar.interop.hf import save_model, save_quantized, save_widths
from entrenar.model import Llama, LlamaConfig
from entrenar.ops import quantize_nf_bits, stored_bytes
from entrenar.peft import QuantizeConfig, layer_number, put_quantized
from entrenar.recipe import write_model_folder

DEVIATION, ROW_SPREAD = 0.02, 0.25
SHARD_BYTES = 500 * 10**6


class RandomWeights(Mapping[str, Tensor]):
    """The weights of a model, each drawn when it is asked for."""

    def __init__(self, config: LlamaConfig, dtype: torch.dtype) -> None:
        with torch.device("meta"):
            self._shapes = {name: parameter.shape for name, parameter in Llama(config).named_parameters()}
        self._dtype = dtype

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=self._dtype)
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        scales = torch.randn(shape[0], 1, generator=generator).mul_(ROW_SPREAD).exp_().mul_(DEVIATION)
        return torch.randn(shape, generator=generator).mul_(scales).to(self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def make(config: LlamaConfig, folder: Path, layout: str, held: QuantizeConfig | None = None) -> None:
    """Write the folder, in bfloat16 (`bf16`), float32 (`f32`), NF4 (`nf4`) or mixed widths (`nf-bits`)."""
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "nf4":
        weights = RandomWeights(config, torch.bfloat16)
        save_quantized(folder, config, weights.items(), torch.bfloat16, held=held)
    elif layout == "nf-bits":
        save_widths(folder, *rounded(config))
    else:
        dtype = torch.float32 if layout == "f32" else torch.bfloat16
        save_model(folder, config, RandomWeights(config, dtype), max_shard_bytes=SHARD_BYTES)


def rounded(config: LlamaConfig) -> tuple[Llama, float]:
    """Return a model near 3.9 bits a weight, three layers in ten with 3 bits, the rest with 4."""
    weights, size = RandomWeights(config, torch.bfloat16), 0
    with torch.device("meta"):
        model = Llama(config)
    for name in weights:
        weight, place = weights[name], name.removesuffix(".weight")
        if weight.ndim == 1:
            set_parameter(model, name, weight)
            size += weight.nbytes
            continue
        layer = layer_number(name)
        bits = 3 if layer is not None and layer % 10 in (2, 5, 8) else 4
        few = quantize_nf_bits(weight, bits, is_draft=True)
        put_quantized(model, place, few, torch.bfloat16)
        size += stored_bytes(few)
    return model, 8 * size / config.parameter_count()


def random_model(folder: Path, preset: str, tokenizer: str, dtype: torch.dtype = torch.float32) -> Path:
    """Write a small model of random weights with its tokenizer, and a vocabulary that holds it; return the folder."""
    loaded, config = Tokenizer.load(tokenizer), LlamaConfig.preset(preset)
    model = Llama(config.model_copy(update={"vocab_size": max(loaded.vocab_size, config.vocab_size)}))
    model.init_weights(torch.Generator().manual_seed(0))
    write_model_folder(folder, model, dict(model.to(dtype).named_parameters()), loaded)
    return folder


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("preset")
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--to", choices=("bf16", "f32", "nf4", "nf-bits"), default="bf16")
    arguments.add_argument("--embedding", choices=("keep", "int8", "nf4"), default="keep", help="with nf4")
    parsed = arguments.parse_args()
    held = QuantizeConfig(embedding=parsed.embedding)
    make(LlamaConfig.preset(parsed.preset), parsed.folder, parsed.to, held)
    size_bytes = sum(file.stat().st_size for file in parsed.folder.iterdir())
    print(f"{parsed.folder}: {size_bytes / 1e9:.2f} GB", file=sys.stderr)


if __name__ == "__main__":
    main()
