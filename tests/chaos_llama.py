"""The specification's list (2.6): a LLaMA trains under little memory, a slow core and little time, or says why not.

Run by `make chaos`; a part of it also runs with the suite (`tests/train/test_chaos_memory.py`, `tests/quality/chaos`).
"""

from collections.abc import Callable

import pytest
import torch

from entrenar.data import Batch
from entrenar.errors import OutOfMemoryError
from entrenar.model import Llama, LlamaConfig, batch_loss
from entrenar.quality.chaos import ChaosConfig, run_function
from entrenar.train import OptimConfig, build_optimizer, is_oom

pytestmark = pytest.mark.chaos
MB = 1 << 20


def _train_step(batch_size: int, steps: int = 1) -> Callable[[], None]:
    """Return a function that builds a model and takes steps; memory that runs out is a typed error."""
    config = LlamaConfig(
        vocab_size=512, hidden_size=128, num_layers=4, num_heads=4, num_kv_heads=2, intermediate_size=344,
        max_seq_len=256,
    )  # fmt: skip

    def work() -> None:
        torch.set_num_threads(1)
        try:
            model = Llama(config)
            model.init_weights(torch.Generator().manual_seed(0))
            optimizer = build_optimizer(model.named_parameters(), OptimConfig(lr=1e-3, weight_decay=0.01))
            loss = batch_loss(model, torch.device("cpu"), is_compiled=False)
            ids = torch.randint(0, 512, (batch_size, 256), generator=torch.Generator().manual_seed(1))
            for _ in range(steps):
                optimizer.gradients.begin(1)
                loss(Batch(ids, ids.roll(-1, 1), None, None)).backward()
                optimizer.step(1e-3, 1 / ids.numel())
        except (MemoryError, RuntimeError) as error:
            if not is_oom(error):
                raise
            raise OutOfMemoryError(f"memory ran out: {error}") from error
        assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())

    return work


@pytest.mark.parametrize("memory_mb", [1024, 512, 256, 128, 64, 32, 8, 1])
def test_llama_training_under_memory_pressure(memory_mb):
    """From ample to impossible: a finite result or a typed error, nothing between; ample is enough, 1 MB is not."""
    chaos = ChaosConfig().with_memory_limit(memory_mb * MB).with_timeout(300).build()
    outcome = run_function(chaos, _train_step(batch_size=4))
    outcome.demand()
    assert outcome.ending == {1024: "survived", 1: "refused"}.get(memory_mb, outcome.ending)
    assert outcome.error in (None, "OutOfMemoryError")


def test_llama_training_on_a_slow_core():
    """A fifth of a core: slower, and done."""
    outcome = run_function(ChaosConfig().with_cpu_limit(0.2).with_timeout(300), _train_step(batch_size=1, steps=2))
    assert outcome.ending == "survived"


def test_llama_training_that_takes_too_long_is_ended():
    """Ten thousand steps in two seconds: ended, and nothing is left running."""
    outcome = run_function(ChaosConfig().with_timeout(2), _train_step(batch_size=4, steps=10_000))
    assert outcome.ending == "timed_out"
