"""Write adapters as PEFT folders, and read them back into the parameters in training, bit for bit."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from entrenar.errors import CheckpointError, DataError
from entrenar.interop.hf import open_folder, widest_dtype
from entrenar.interop.hf_peft import (
    WEIGHTS_FILE,
    BaseIdentity,
    load_adapter,
    named_base,
    read_base,
    save_adapter,
)
from entrenar.interop.peft_keys import keys_by_parameter
from entrenar.interop.safetensors_file import TensorReader, read_header
from entrenar.model import Llama
from entrenar.ops import Nf4Weight
from entrenar.peft import DEFAULT_ADAPTER, LoraConfig, LoraLinear, LowRank, set_adapter, wrappers

# The folder, in a run's own, of a base that was rounded for the run.
ROUNDED_FOLDER = "base"


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter."""
    return (folder / "adapter_config.json").is_file()


def base_of(folder: Path) -> tuple[Path, BaseIdentity]:
    """Return the folder of an adapter's base and the base's identity, both from the adapter's record.

    If that folder is gone, a base in the adapter's own run may be it; the hash decides when the base is used.

    Raises:
        DataError: the adapter does not name its base, or the base is gone.
    """
    base, foreign = read_base(folder), named_base(folder)
    if base is None and foreign is not None and (Path(foreign) / "config.json").is_file():
        # PEFT records no hash, only where the base was: apply the adapter to the folder in its stored form.
        _, places, is_packed = open_folder(Path(foreign))
        kind = f"{Nf4Weight.kind} " if is_packed else ""
        return Path(foreign), BaseIdentity(foreign, f"{kind}{widest_dtype(places)}", "")
    named = "does not name its base" if foreign is None else f"has its base at {foreign}, which is not a folder here"
    if base is not None and base.name is not None:
        # A run that was moved took its own base along: RUN/checkpoints/STEP/model belongs to RUN/base.
        for place in (Path(base.name), folder.resolve().parent.parent.parent / ROUNDED_FOLDER):
            if (place / "config.json").is_file():
                return place, base
        named = f"has its base at {base.name}, which is gone"
    raise DataError(f"adapter {folder} {named}; pass the base to `entrenar merge BASE {folder} OUT`, and use OUT")


def use_adapter(folder: Path, model: Llama) -> None:
    """Load an adapter over its base and activate it."""
    load_adapter(folder, model)
    set_adapter(model, DEFAULT_ADAPTER)


def write_adapter(
    folder: Path, model: Llama, config: LoraConfig, base: BaseIdentity, weights: Mapping[str, Tensor]
) -> None:
    """Write the adapter in training, with these weights, as a PEFT folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_adapter(folder, model, config, base=base, weights=weights)


def read_weights(folder: Path, model: Llama, base: BaseIdentity) -> dict[str, Tensor]:
    """Return the weights of an adapter folder under the names of the model's own parameters.

    A PiSSA adapter is written with its initial matrices next to the trained ones; they are restored too.

    Raises:
        CheckpointError: the adapter was trained on another base, or lacks a tensor of the one in training.
    """
    recorded = read_base(folder)
    if recorded is None or recorded.sha256 != base.sha256:
        raise CheckpointError(
            f"{folder} was trained on another base (sha256 {recorded.sha256[:12] if recorded else 'unknown'}…, "
            f"this one has {base.sha256[:12]}…); give --model the base that it was trained on"
        )
    header, reader = read_header(folder / WEIGHTS_FILE), TensorReader()
    weights = {
        own: reader.read(folder / WEIGHTS_FILE, key, header[key], header[key].dtype)
        for own, key in keys_by_parameter(model, DEFAULT_ADAPTER).items()
        if key in header
    }
    for path, module in wrappers(model):
        if isinstance(module, LoraLinear):
            _put_back_start(module.adapter(DEFAULT_ADAPTER), weights, f"{path}.adapters.{DEFAULT_ADAPTER}")
    return weights


def _put_back_start(adapter: LowRank, weights: dict[str, Tensor], name: str) -> None:
    if adapter.start_a is None or adapter.start_b is None:
        return
    rank = adapter.lora_A.shape[0]
    lora_a, lora_b = weights.get(f"{name}.lora_A"), weights.get(f"{name}.lora_B")
    if lora_a is None or lora_b is None:
        return
    weights[f"{name}.lora_A"] = lora_a[:rank].to(adapter.lora_A.dtype)
    weights[f"{name}.lora_B"] = lora_b[:, :rank].to(adapter.lora_B.dtype)
    with torch.no_grad():
        adapter.start_a.copy_(lora_a[rank:])
        adapter.start_b.copy_(-lora_b[:, rank:])
