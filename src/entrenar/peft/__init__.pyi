from entrenar.peft.checked_merge import MergeReport, checked_merge
from entrenar.peft.config import LoraConfig
from entrenar.peft.fingerprint import fingerprint
from entrenar.peft.layers import LoraLinear, LowRank, SavedModule
from entrenar.peft.lora import (
    DEFAULT_ADAPTER,
    active_adapter,
    adapter_names,
    add_adapter,
    from_base,
    learning_rate_factors,
    merge,
    plain_state,
    set_adapter,
    unload,
    unmerge,
    wrappers,
)
from entrenar.peft.quantize_config import QuantizeConfig
from entrenar.peft.quantize_weight import kinds_held, quantize_weight
from entrenar.peft.quantized import (
    QuantizedEmbedding,
    QuantizedLinear,
    memory_lines,
    put_quantized,
    quantized_projections,
    quantized_weights,
    widen,
)
from entrenar.peft.targets import find_saved, find_targets, layer_number, shape_of
from entrenar.peft.trainable import TrainableTable, trainable_table
from entrenar.peft.trunk import TrunkCache, highest_cut
from entrenar.peft.trunk_config import TrunkConfig

__all__ = [
    "DEFAULT_ADAPTER",
    "LoraConfig",
    "LoraLinear",
    "LowRank",
    "MergeReport",
    "QuantizeConfig",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "SavedModule",
    "TrainableTable",
    "TrunkCache",
    "TrunkConfig",
    "active_adapter",
    "adapter_names",
    "add_adapter",
    "checked_merge",
    "find_saved",
    "find_targets",
    "fingerprint",
    "from_base",
    "highest_cut",
    "kinds_held",
    "layer_number",
    "learning_rate_factors",
    "memory_lines",
    "merge",
    "plain_state",
    "put_quantized",
    "quantize_weight",
    "quantized_projections",
    "quantized_weights",
    "set_adapter",
    "shape_of",
    "trainable_table",
    "unload",
    "unmerge",
    "widen",
    "wrappers",
]
