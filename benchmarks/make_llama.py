"""Write a LLaMA of any size with random weights, tensor by tensor: for time and memory, not for what it says.

    python benchmarks/make_llama.py 7b DIR --to nf4        3.9 GB; the bfloat16 model (13.5 GB) never exists
    python benchmarks/make_llama.py 1b DIR --to bf16

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
from entrenar.interop.hf import save_model, save_quantized
from entrenar.model import Llama, LlamaConfig
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


def make(config: LlamaConfig, folder: Path, layout: str) -> None:
    """Write the folder, in bfloat16 (`bf16`), float32 (`f32`), or with its projections in four bits (`nf4`)."""
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "nf4":
        weights = RandomWeights(config, torch.bfloat16)
        save_quantized(folder, config, weights.items(), torch.bfloat16)
    else:
        dtype = torch.float32 if layout == "f32" else torch.bfloat16
        save_model(folder, config, RandomWeights(config, dtype), max_shard_bytes=SHARD_BYTES)


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
    arguments.add_argument("--to", choices=("bf16", "f32", "nf4"), default="bf16")
    parsed = arguments.parse_args()
    make(LlamaConfig.preset(parsed.preset), parsed.folder, parsed.to)
    size_bytes = sum(file.stat().st_size for file in parsed.folder.iterdir())
    print(f"{parsed.folder}: {size_bytes / 1e9:.2f} GB", file=sys.stderr)


if __name__ == "__main__":
    main()
