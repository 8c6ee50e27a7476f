"""The model beyond parity: names, tied head, packed documents, checkpointing, initial weights, meta device."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from entrenar.errors import DataError, FormatError
from entrenar.model import KVCache, Llama, LlamaConfig
from entrenar.ops import document_spans

SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 40,
    "max_seq_len": 32,
}
BLOCK_NAMES = {
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.o_proj.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
}


def small_model(*, tied: bool = False, dtype: torch.dtype = torch.float64) -> Llama:
    model = Llama(LlamaConfig(**SMALL, tie_word_embeddings=tied)).to(dtype)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(1))
    return model


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(61, shape, generator=torch.Generator().manual_seed(4))


def test_weight_names_are_hugging_faces() -> None:
    """An untied model's state dict has exactly LlamaForCausalLM's names; a tied one has no second copy of the head."""
    trunk = {f"model.layers.{layer}.{name}" for layer in range(2) for name in BLOCK_NAMES}
    trunk |= {"model.embed_tokens.weight", "model.norm.weight"}
    assert set(small_model().state_dict()) == trunk | {"lm_head.weight"}
    assert set(small_model(tied=True).state_dict()) == trunk


def test_tied_head_is_the_embedding() -> None:
    """A change of the embedding is a change of the head, and both uses add to one gradient."""
    model, input_ids = small_model(tied=True), tokens(1, 5)
    model.loss(input_ids, input_ids).backward()
    gradient = model.model.embed_tokens.weight.grad
    assert gradient is not None
    assert gradient.abs().sum(1).gt(0).all(), "every row has a gradient, since every token has a logit"
    assert model.head_weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("has_embedding", [True, False])
def test_tied_model_takes_a_state_dict_that_holds_the_head(has_embedding: bool) -> None:  # noqa: FBT001
    """The same matrix under the head's name, beside the embedding or instead of it, loads strictly."""
    source, target = small_model(tied=True), Llama(LlamaConfig(**SMALL, tie_word_embeddings=True)).double()
    state = source.state_dict()
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    if not has_embedding:
        del state["model.embed_tokens.weight"]
    target.load_state_dict(state, strict=True)
    torch.testing.assert_close(target(tokens(1, 5)), source(tokens(1, 5)), rtol=0, atol=0)


def test_tied_model_refuses_another_head() -> None:
    """A head that differs from the embedding is not dropped in silence."""
    model = small_model(tied=True)
    state = model.state_dict() | {"lm_head.weight": torch.zeros(61, 32, dtype=torch.float64)}
    with pytest.raises(FormatError, match=r"lm_head.weight must equal model.embed_tokens.weight, .* set tie_word_emb"):
        model.load_state_dict(state)


@pytest.mark.parametrize("cuts", [[20], [1, 19], [7, 6, 7], [1] * 20])
def test_packed_documents_equal_each_alone(cuts: list[int]) -> None:
    """Logits, loss and gradients of a packed row are those of its documents by themselves."""
    model, input_ids, targets = small_model(), tokens(1, 20), tokens(1, 20).flip(1)
    ids = torch.cat([torch.full((length,), number) for number, length in enumerate(cuts)])[None]
    documents = document_spans(ids)
    alone = torch.cat([model(piece) for piece in input_ids.split(cuts, dim=1)], dim=1)
    torch.testing.assert_close(model(input_ids, documents=documents), alone, rtol=0, atol=1e-11)
    model.loss(input_ids, targets, documents=documents).backward()
    packed = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    for piece, wanted in zip(input_ids.split(cuts, dim=1), targets.split(cuts, dim=1), strict=True):
        model.loss(piece, wanted).backward()
    torch.testing.assert_close(packed, [parameter.grad for parameter in model.parameters()], rtol=0, atol=1e-10)


def test_documents_and_cache_exclude_each_other() -> None:
    """A cache beside documents is refused: it would be ignored."""
    model, cache = small_model(), KVCache(LlamaConfig(**SMALL), 1, 4, dtype=torch.float64)
    with pytest.raises(DataError, match="documents and a key/value cache exclude each other"):
        model(tokens(1, 4), documents=document_spans(torch.zeros(1, 4, dtype=torch.int32)), cache=cache)


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_checkpointing_changes_memory_and_no_gradient(checkpointing: Any) -> None:
    """Recomputed activations give bit for bit the same gradients, from less saved memory."""

    def gradients_and_saved_bytes(model: Llama) -> tuple[list[Any], int]:
        saved: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model.loss(tokens(2, 16), tokens(2, 16))
            total = sum(saved.values())
        model.zero_grad()
        loss.backward()
        return [parameter.grad for parameter in model.parameters()], total

    model = small_model()
    expected, all_bytes = gradients_and_saved_bytes(model)
    model.checkpointing = checkpointing
    gradients, fewer_bytes = gradients_and_saved_bytes(model)
    torch.testing.assert_close(gradients, expected, rtol=0, atol=0)
    assert fewer_bytes < all_bytes


def test_initial_weights_follow_the_generator_alone() -> None:
    """The same seed gives the same weights whatever torch's own generator did; another seed gives others."""

    def drawn(seed: int, *, noise: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        torch.manual_seed(noise)
        model = Llama(LlamaConfig(**SMALL)).to(dtype)
        model.init_weights(torch.Generator().manual_seed(seed))
        return model.state_dict()

    first = drawn(1, noise=1)
    torch.testing.assert_close(drawn(1, noise=2), first, rtol=0, atol=0)
    half = drawn(1, noise=3, dtype=torch.bfloat16)
    assert all(torch.equal(half[name], weight.bfloat16()) for name, weight in first.items())
    assert not torch.equal(drawn(2, noise=1)["lm_head.weight"], first["lm_head.weight"])


@pytest.mark.parametrize("tied", [True, False])
def test_initial_weights_have_their_deviations(tied: bool) -> None:  # noqa: FBT001
    """Norms are one, residual projections have 1/sqrt(2L) of the deviation of all else."""
    config = LlamaConfig.preset("tiny", num_layers=3, tie_word_embeddings=tied, initializer_range=0.05)
    model = Llama(config)
    model.init_weights(torch.Generator().manual_seed(0))
    for name, weight in model.named_parameters():
        if "norm" in name:
            assert weight.eq(1).all(), name
            continue
        expected = 0.05 / math.sqrt(6) if "o_proj" in name or "down_proj" in name else 0.05
        assert float(weight.detach().std()) == pytest.approx(expected, rel=0.02), name
        assert abs(float(weight.detach().mean())) < 0.02 * expected, name


def test_model_built_on_meta_becomes_real() -> None:
    """A model built on the meta device takes memory, weights and positions later, and a tied head stays tied."""
    with torch.device("meta"):
        model = Llama(LlamaConfig(**SMALL, tie_word_embeddings=True))
        assert model(torch.zeros(1, 4, dtype=torch.long)).is_meta
    model.to_empty(device="cpu")
    model.init_weights(torch.Generator().manual_seed(0))
    direct = Llama(LlamaConfig(**SMALL, tie_word_embeddings=True))
    direct.init_weights(torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(tokens(1, 6)), direct(tokens(1, 6)), rtol=0, atol=0)
    assert model.head_weight is model.model.embed_tokens.weight


def test_copy_is_independent() -> None:
    """A deep copy computes the same and shares no weight."""
    model = small_model(tied=True)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(tokens(1, 5)), model(tokens(1, 5)), rtol=0, atol=0)
    with torch.no_grad():
        twin.model.embed_tokens.weight.zero_()
    assert model.model.embed_tokens.weight.abs().sum() > 0
    twin.load_state_dict(model.state_dict())


def load_stories(folder: Path) -> Llama:
    model = Llama(LlamaConfig.from_hf(json.loads((folder / "config.json").read_text())))
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return model


@torch.no_grad()
def test_published_stories260k_logits_and_loss(shared_data: Path) -> None:
    """The published 260K model gives the logits and losses that two independent implementations give."""
    folder = shared_data / "models/stories260K_hf"
    model, reference = load_stories(folder), np.load(folder / "reference_logits.npz")
    logits = model(torch.from_numpy(reference["prompt_ids"])[None])[0]
    assert np.abs(logits.numpy() - reference["logits_numpy_fp64"]).max() < 1e-4
    for ids, expected in zip(torch.from_numpy(reference["loss_ids"]), reference["loss_hf"], strict=True):
        loss = model.loss(ids[None, :-1], ids[None, 1:]) / (len(ids) - 1)
        assert float(loss) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_model_cut_at_a_layer_is_the_model(layer: int) -> None:
    """The blocks below a layer, then the rest, give the whole model's loss bit for bit, packed or not."""
    model = Llama(LlamaConfig(**SMALL))
    model.init_weights(torch.Generator().manual_seed(0))
    ids = torch.arange(12).reshape(2, 6)
    for documents in (None, document_spans(torch.tensor([[0, 0, 1, 1, 1, 2]] * 2))):
        below = model.hidden_below(ids, layer, documents=documents)
        for targets in (ids, ids.where(ids % 3 == 0, -100)):
            whole = model.loss(ids, targets, documents=documents)
            assert torch.equal(model.loss_from(below, layer, targets, documents=documents), whole)
        assert torch.equal(below, model.model.embed_tokens(ids)) == (layer == 0)


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_tokens_without_a_target_are_seen_and_cost_no_more_than_that(checkpointing: str) -> None:
    """The last block's MLP meets the tokens with a target alone; loss and gradients are those of all hidden states."""
    model = Llama(LlamaConfig(**SMALL)).double()
    model.init_weights(torch.Generator().manual_seed(0))
    model.checkpointing = checkpointing
    ids = torch.arange(24).reshape(2, 12)
    targets = torch.full_like(ids, -100)
    targets[0, 3:5], targets[1, 11] = 7, 8
    documents = document_spans(torch.tensor([[0] * 6 + [1] * 6] * 2))
    wanted = model.logits(model.hidden(ids, documents=documents)).flatten(0, 1)
    torch.nn.functional.cross_entropy(wanted, targets.flatten(), reduction="sum").backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    seen: list[tuple[int, ...]] = []
    for block in model.model.layers:
        block.mlp.register_forward_hook(lambda *called: seen.append(tuple(called[2].shape[:2])))
    model.loss(ids, targets, documents=documents).backward()
    assert seen[: len(model.model.layers)] == [(2, 12)] * (len(model.model.layers) - 1) + [(1, 3)]
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-12)


def test_a_batch_without_a_target_has_no_loss() -> None:
    """Nothing asked is a loss of zero with gradients of zero."""
    model = Llama(LlamaConfig(**SMALL))
    model.init_weights(torch.Generator().manual_seed(0))
    loss = model.loss(torch.arange(6)[None], torch.full((1, 6), -100))
    loss.backward()
    assert float(loss.detach()) == 0
    assert not any(parameter.grad.any() for parameter in model.parameters())
