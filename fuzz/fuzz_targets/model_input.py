"""Fuzz what reaches a model: configs, token ids, targets and documents give a finite loss or an error of ours.

    python fuzz/fuzz_targets/model_input.py -runs=1000000 -len_control=0

`--planted` leaves out the model's own check of its ids, which must be found.
"""

import sys

import atheris
import torch

with atheris.instrument_imports(include=["entrenar.model", "entrenar.ops"]):
    from entrenar.errors import EntrenarError
    from entrenar.model import Llama, LlamaConfig, llama
    from entrenar.ops import document_spans

torch.set_num_threads(1)
PLANTED = "--planted" in sys.argv
MODEL = Llama(
    LlamaConfig(
        vocab_size=17, hidden_size=8, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_size=8, max_seq_len=12
    )
)
MODEL.init_weights(torch.Generator().manual_seed(0))
if PLANTED:
    llama.check_token_ids = lambda *_: None


def table(provider: atheris.FuzzedDataProvider, shape: tuple[int, ...], least: int, most: int) -> torch.Tensor:
    """Draw whole numbers."""
    count = 1
    for size in shape:
        count *= size
    return torch.tensor(provider.ConsumeIntListInRange(count, least, most), dtype=torch.int64).reshape(shape)


def check_config(provider: atheris.FuzzedDataProvider) -> None:
    """A config is valid and builds, or is refused."""
    names = ["vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "intermediate_size", "max_seq_len",
             "head_dim", "rope_theta"]  # fmt: skip
    values = {name: provider.ConsumeIntInRange(-2, 24) for name in names if provider.ConsumeBool()}
    try:
        config = LlamaConfig.model_validate({"num_layers": 1, "vocab_size": 3, **values})
        with torch.device("meta"):
            model = Llama(config)
    except EntrenarError:
        return
    except ValueError as fault:
        assert type(fault).__name__ == "ValidationError", fault  # pydantic's own
        return
    assert sum(p.numel() for p in model.parameters()) == config.parameter_count()


def check_input(provider: atheris.FuzzedDataProvider) -> None:
    """Ids give a finite loss and gradient, or are refused."""
    batch, time = provider.ConsumeIntInRange(0, 3), provider.ConsumeIntInRange(0, 14)
    is_wild = provider.ConsumeBool()
    other = (provider.ConsumeIntInRange(0, 3), provider.ConsumeIntInRange(0, 14)) if is_wild else (batch, time)
    ids = table(provider, (batch, time), *((-1, 18) if is_wild else (0, 16)))
    targets = table(provider, other, *((-101, 18) if is_wild else (0, 16)))
    try:
        documents = document_spans(table(provider, other, 0, 2).sort(-1).values) if provider.ConsumeBool() else None
        loss = MODEL.loss(ids, targets, documents=documents)
    except EntrenarError:
        return
    assert targets.shape == ids.shape, (targets.shape, ids.shape)
    assert torch.isfinite(loss), (ids, targets)
    MODEL.zero_grad()
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in MODEL.parameters() if p.grad is not None)


def check(data: bytes) -> None:
    """Check a config or an input."""
    provider = atheris.FuzzedDataProvider(data)
    (check_config if provider.ConsumeIntInRange(0, 3) == 0 else check_input)(provider)


atheris.Setup([word for word in sys.argv if word != "--planted"], check)
atheris.Fuzz()
