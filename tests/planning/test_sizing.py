"""A run without a preset gets a model that its corpus can teach; one that cannot fit is refused before it is built."""

import pytest
import torch

from entrenar.config_file import load_config
from entrenar.errors import OutOfMemoryError
from entrenar.model import Llama
from entrenar.planning import MemoryLimit, check_room, sized
from entrenar.planning.sizing import least_bytes
from entrenar.train import build_optimizer

ROOMY = 64 << 30


def _sized(tokens: int, room_bytes: int = ROOMY, **flags: str):
    config = load_config(None, {f"model.{key}": value for key, value in flags.items()})
    return sized(config, vocab_size=640, tokens=tokens, room_bytes=room_bytes)


def test_more_text_makes_a_larger_model_with_the_vocabulary_of_the_corpus():
    """The model grows with the corpus, keeps a parameter to five tokens above the smallest, and never 6.7 billion."""
    models = [_sized(tokens).model for tokens in (0, 10**6, 10**7, 10**8, 10**12)]
    widths = [model.hidden_size for model in models]
    assert widths == sorted(widths)
    assert (widths[0], widths[-1]) == (64, 768)
    assert {model.vocab_size for model in models} == {640}
    assert all(
        model.parameter_count() <= tokens / 5 for model, tokens in zip(models[1:], (10**6, 10**7, 10**8), strict=False)
    )


def test_little_memory_makes_a_smaller_model():
    """Weights, gradients and moments take at most half of the memory."""
    small = _sized(10**12, room_bytes=100 << 20)
    assert 64 < small.model.hidden_size < 768
    assert least_bytes(small) <= 50 << 20


def test_what_the_user_set_stays():
    """A width given by hand gets its proportions, other fields stay, and a preset is left alone."""
    by_width = _sized(10**12, hidden_size="384")
    assert (by_width.model.hidden_size, by_width.model.num_layers, by_width.model.num_heads) == (384, 6, 6)
    assert by_width.model.vocab_size == 640
    assert _sized(10**7, num_layers="9").model.num_layers == 9
    preset = load_config(None, {"preset": "tiny"})
    assert sized(preset, vocab_size=640, tokens=1, room_bytes=1) is preset


@pytest.mark.parametrize(
    ("optimizer", "precision"), [("adamw", "float32"), ("muon", "float32"), ("adamw8bit", "bfloat16")]
)
def test_what_cannot_fit_is_refused_with_what_would(optimizer, precision):
    """7b on six gigabytes is an error of the machine that names what it takes and the command to ask."""
    config = load_config(None, {"preset": "7b", "optim.optimizer": optimizer, "train.precision": precision})
    message = r"training 6,738,415,616 parameters takes at least .* GB .* but --memory is 6\.0 GB; `entrenar plan --"
    with pytest.raises(OutOfMemoryError, match=message):
        check_room(config, MemoryLimit(6 * 10**9, "--memory"))
    check_room(load_config(None, {"preset": "tiny"}), MemoryLimit(6 * 10**9, "--memory"))


def test_the_bound_is_what_the_optimizer_really_holds():
    """Weights, gradients and moments of a built optimizer take no less than the bound says."""
    for optimizer in ("adamw", "muon", "adamw8bit"):
        for precision in ("float32", "bfloat16"):
            flags = {"optim.optimizer": optimizer, "train.precision": precision, "model.hidden_size": "128"}
            config = sized(load_config(None, flags), vocab_size=640, tokens=0, room_bytes=1)
            model = Llama(config.model)
            model.init_weights(torch.Generator().manual_seed(0))
            built = build_optimizer(model.named_parameters(), config.optim, config.train.precision)
            parameters = sum(parameter.nbytes for parameter in model.parameters())
            held = 2 * parameters + sum(tensor.nbytes for tensor in built.state_dict().values())
            assert least_bytes(config) <= held * 1.01
