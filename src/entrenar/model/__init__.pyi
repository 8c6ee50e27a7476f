from entrenar.model.batch_loss import TokenBatch, batch_loss
from entrenar.model.config import Checkpointing, LlamaConfig, PresetName, RopeScaling
from entrenar.model.kv_cache import KVCache
from entrenar.model.llama import Llama

__all__ = [
    "Checkpointing",
    "KVCache",
    "Llama",
    "LlamaConfig",
    "PresetName",
    "RopeScaling",
    "TokenBatch",
    "batch_loss",
]
