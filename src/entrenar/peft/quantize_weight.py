"""Quantize a weight of a model, and see how its embedding and head are held."""

from jaxtyping import Float
from torch import Tensor, nn

from entrenar.errors import DataError
from entrenar.ops import QUANTIZE, QuantizedWeight
from entrenar.peft.quantize_config import EMBEDDING, HEAD


def quantize_weight(name: str, weight: Float[Tensor, "O I"], kind: str) -> QuantizedWeight:
    """Quantize a weight, `name` for the message.

    Raises:
        DataError: a number is NaN or infinite.
    """
    try:
        return QUANTIZE[kind](weight)
    except DataError as error:
        raise DataError(f"{name}: {error}") from error


def kinds_held(model: nn.Module) -> dict[str, str]:
    """Return how embedding and head of a model are held: keep, or the kind of a quantized weight."""
    modules = dict(model.named_modules())
    places = {key: name.removesuffix(".weight") for key, name in (("embedding", EMBEDDING), ("head", HEAD))}
    held = {key: getattr(modules[place], "quantized", None) for key, place in places.items() if place in modules}
    return {key: "keep" if weight is None else weight.kind for key, weight in held.items()}
