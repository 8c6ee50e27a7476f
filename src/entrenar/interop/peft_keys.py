"""PEFT's names for the tensors of an adapter: the one place that knows their grammar.

    base_model.model.PATH.lora_A.weight          PATH.adapters.NAME.lora_A
    base_model.model.PATH.lora_B.weight          PATH.adapters.NAME.lora_B
    base_model.model.PATH.lora_magnitude_vector  PATH.adapters.NAME.lora_magnitude_vector
    base_model.model.PATH.weight                 PATH.adapters.NAME      (a module that is trained as a whole)

with PATH the module's name in the base, on the left in the file and on the right the parameter in our model. Source:
`get_peft_model_state_dict` of peft, which leaves the adapter's own name out.
"""

from torch import nn

_PREFIX = "base_model.model."
# Parts that are parameters of their own in PEFT; the matrices are modules there, with a `weight` each.
_BARE_PARTS = ("lora_magnitude_vector",)
LORA_A, LORA_B, MAGNITUDE = "lora_A", "lora_B", "lora_magnitude_vector"
WHOLE = ""


def key_of(path: str, part: str = WHOLE) -> str:
    """Return the name of one tensor of the module at `path`: a part of its adapter, or its own weight."""
    if part in _BARE_PARTS:
        return f"{_PREFIX}{path}.{part}"
    return f"{_PREFIX}{path}.{part}.weight" if part else f"{_PREFIX}{path}.weight"


def split_key(key: str) -> tuple[str, str]:
    """Return path and part of a name; the part of a name that is not an adapter's is '' (WHOLE)."""
    path = key.removeprefix(_PREFIX)
    for part in (LORA_A, LORA_B, MAGNITUDE):
        if key_of(path_before := path.partition(f".{part}")[0], part) == key:
            return path_before, part
    return path.removesuffix(".weight"), WHOLE


def keys_by_parameter(model: nn.Module, name: str) -> dict[str, str]:
    """Return the key of each parameter that adapter `name` has in the model, by the parameter's own name."""
    keys: dict[str, str] = {}
    for own, _ in model.named_parameters():
        path, found, rest = own.partition(f".adapters.{name}")
        if found and rest[:1] in ("", "."):
            keys[own] = key_of(path, rest[1:])
    return keys
