"""The trunk cache changes what a step costs and not what it computes, and says so when it cannot."""

import contextlib
import copy
import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from entrenar.errors import ConfigError, MachineError
from entrenar.model import Llama, LlamaConfig
from entrenar.ops import DocumentSpans, document_spans
from entrenar.peft import LoraConfig, TrunkCache, TrunkConfig, add_adapter, from_base, highest_cut, set_adapter
from entrenar.peft.trunk_rows import RowFormat
from entrenar.peft.trunk_store import TrunkStore

CONFIG = LlamaConfig(
    vocab_size=61, hidden_size=32, num_layers=4, num_heads=4, num_kv_heads=2, intermediate_size=40, max_seq_len=32
)
TOP = LoraConfig(rank=4, layers="top:1")


def build(lora: LoraConfig | None = TOP, dtype: torch.dtype = torch.float32, **changes: object) -> Llama:
    model = Llama(CONFIG.model_copy(update=changes))
    model.init_weights(torch.Generator().manual_seed(0))
    model.to(dtype)
    if lora is not None:
        from_base(model, lora, torch.Generator().manual_seed(1))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def packed(order: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, DocumentSpans]:
    """Six documents of two to seven tokens in rows of twelve, in any order; the rest of a row is padding."""
    documents = [torch.arange(2 + number) * 7 % 60 + 1 - number % 2 for number in range(6)]
    rows: list[list[int]] = [[]]
    for number in order:
        if sum(len(documents[other]) for other in rows[-1]) + len(documents[number]) > 12:
            rows.append([])
        rows[-1].append(number)
    ids, targets, numbers = (torch.zeros(len(rows), 12, dtype=torch.int64) for _ in range(3))
    targets.fill_(-100)
    for row, members in enumerate(rows):
        start = 0
        for place, number in enumerate(members):
            end = start + len(documents[number])
            ids[row, start:end] = documents[number]
            targets[row, start + 1 : end] = documents[number][:-1]
            numbers[row, start:end] = place
            start = end
        numbers[row, start:] = len(members)
    return ids, targets, document_spans(numbers)


OpenCache = Callable[..., TrunkCache]


@pytest.fixture
def cache() -> Iterator[OpenCache]:
    """Open caches, exact unless told otherwise, and close them when the test is over."""
    with contextlib.ExitStack() as stack:

        def open_cache(model: Llama, folder: Path, events: list[str] | None = None, **changes: object) -> TrunkCache:
            config = TrunkConfig(**{"trunk_dir": folder, "trunk_rows": "float32", **changes})
            on_event = (events if events is not None else []).append
            opened = TrunkCache(model, config, tokenizer_hash="abc", on_event=on_event)
            stack.callback(opened.close)
            return opened

        yield open_cache


def gradients(model: Llama, loss: Callable[..., torch.Tensor], order: tuple[int, ...]) -> list[torch.Tensor]:
    ids, targets, documents = packed(order)
    value = loss(ids, targets, documents=documents)
    value.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    result = [value.detach(), *(parameter.grad.clone() for parameter in trained)]
    for parameter in trained:
        parameter.grad = None
    return result


ORDERS = [(0, 1, 2, 3, 4, 5), (5, 3, 1, 0, 2, 4), (4, 2, 0, 1, 3, 5)]


def test_loss_and_gradients_are_the_models_own_in_every_epoch(cache: OpenCache, tmp_path: Path) -> None:
    """Written, then read twice in other packings: loss and adapter gradients are those of the uncached path."""
    model = build()
    trunk = cache(model, tmp_path)
    for epoch, order in enumerate(ORDERS):
        for ours, expected in zip(
            gradients(model, trunk.loss, order), gradients(model, model.loss, order), strict=True
        ):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
        assert (trunk.documents_computed, trunk.documents_read) == (6, 6 * epoch)
    assert trunk.is_active


def test_later_epochs_run_no_layer_below_the_cut(cache: OpenCache, tmp_path: Path) -> None:
    """Once all documents are held, no block below the cut is called, apart from the checked batches."""
    model = build()
    calls: list[int] = []
    for layer, block in enumerate(model.model.layers):
        block.register_forward_hook(lambda *_, layer=layer: calls.append(layer))
    trunk = cache(model, tmp_path, trunk_checks=1)
    for order in ORDERS:
        gradients(model, trunk.loss, order)
    assert calls == [0, 1, 2, 3, 0, 1, 2, 3, 3]  # written; read and checked; read


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_rounded_rows_stay_within_their_bound(cache: OpenCache, kind: str, tmp_path: Path) -> None:
    """Read states differ from computed ones by the format's bound at most, and by more than nothing."""
    model = build()
    trunk = cache(model, tmp_path, trunk_rows=kind)
    ids, targets, documents = packed(ORDERS[0])
    exact = model.hidden_below(ids, 3, documents=documents).detach()
    first = trunk.states(ids, targets, documents)
    again = trunk.states(ids, targets, documents)
    assert torch.equal(first, again)
    kept = torch.arange(12) < torch.tensor([spans[-1][0] for spans in documents])[:, None]
    error = ((first - exact).norm(dim=-1) / exact.norm(dim=-1))[kept]
    assert 1e-6 < float(error.max()) <= RowFormat(kind, 32).largest_error + 1e-6
    assert trunk.is_active


def test_bfloat16_model_reads_back_bit_for_bit(cache: OpenCache, tmp_path: Path) -> None:
    """bfloat16 rows of a bfloat16 model are no rounding: what is read in the same packing is what was computed."""
    model = build(dtype=torch.bfloat16)
    trunk = cache(model, tmp_path, trunk_rows="bfloat16")
    ids, targets, documents = packed(ORDERS[0])
    kept = torch.arange(12) < torch.tensor([spans[-1][0] for spans in documents])[:, None]
    exact = model.hidden_below(ids, 3, documents=documents)
    trunk.states(ids, targets, documents)
    assert torch.equal(trunk.states(ids, targets, documents)[kept], exact[kept])
    assert trunk.documents_read == 6


def test_rows_without_documents_are_documents(cache: OpenCache, tmp_path: Path) -> None:
    """A batch that is not packed is cached by row."""
    model = build()
    trunk = cache(model, tmp_path)
    ids = torch.arange(20).reshape(2, 10)
    for _ in range(2):
        torch.testing.assert_close(trunk.loss(ids, ids), model.loss(ids, ids), rtol=1e-5, atol=1e-5)
    assert (trunk.documents_computed, trunk.documents_read) == (2, 2)


def test_a_new_run_reads_what_an_old_one_wrote(cache: OpenCache, tmp_path: Path) -> None:
    """Another adapter of another rank over the same base computes no trunk at all."""
    first = cache(build(), tmp_path)
    first.loss(*packed(ORDERS[0])[:2], documents=packed(ORDERS[0])[2])
    first.close()
    events: list[str] = []
    model = build(LoraConfig(rank=2, layers="top:1", target_modules=("up_proj",), use_dora=True))
    second = cache(model, tmp_path, events)
    gradients(model, second.loss, ORDERS[1])
    assert (second.documents_computed, second.documents_read, events) == (0, 6, [])


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"rope_theta": 500.0}, "architecture"),
        ({"dtype": torch.bfloat16}, "base weights, dtype"),
        ({"lora": LoraConfig(rank=4, layers="top:2")}, "base weights, layers"),
    ],
)
def test_cache_of_another_base_is_built_anew_and_said_aloud(
    cache: OpenCache, other: dict[str, object], named: str, tmp_path: Path
) -> None:
    """A difference in weights, positions, dtype or cut makes the old rows useless; what differs is named."""
    old = cache(build(), tmp_path)
    ids, targets, documents = packed(ORDERS[0])
    old.loss(ids, targets, documents=documents)
    old.close()
    events: list[str] = []
    model = build(**other)
    trunk = cache(model, tmp_path, events)
    assert events == [f"trunk cache {tmp_path} is rebuilt: it was made for another {named}"]
    trunk.loss(ids, targets, documents=documents)
    assert (trunk.documents_computed, trunk.documents_read) == (6, 0)


def test_one_changed_weight_below_the_cut_is_another_base(cache: OpenCache, tmp_path: Path) -> None:
    """A single weight below the cut changes the key; one above it does not."""
    cache(build(), tmp_path).close()
    above, below = build(), build()
    with torch.no_grad():
        above.model.layers[3].mlp.up_proj.weight[0, 0] += 1
        below.model.layers[2].mlp.up_proj.weight[0, 0] += 1e-3
    events: list[str] = []
    cache(above, tmp_path, events).close()
    assert events == []
    cache(below, tmp_path, events).close()
    assert events == [f"trunk cache {tmp_path} is rebuilt: it was made for another base weights"]


def test_damaged_rows_are_computed_again_and_said_aloud(cache: OpenCache, tmp_path: Path) -> None:
    """A flipped bit in a document's rows costs that document one pass, and the loss is right."""
    model = build()
    trunk = cache(model, tmp_path)
    gradients(model, trunk.loss, ORDERS[0])
    trunk.close()
    content = bytearray((tmp_path / "rows.bin").read_bytes())
    content[300] ^= 1
    (tmp_path / "rows.bin").write_bytes(content)
    events: list[str] = []
    trunk = cache(model, tmp_path, events)
    assert torch.equal(gradients(model, trunk.loss, ORDERS[0])[0], gradients(model, trunk.loss, ORDERS[0])[0])
    assert events == [f"trunk cache {tmp_path}: rows of documents are damaged; they are computed again"]
    assert trunk.documents_computed == 1
    torch.testing.assert_close(gradients(model, trunk.loss, ORDERS[1]), gradients(model, model.loss, ORDERS[1]))


def test_torn_index_and_missing_rows_are_dropped_and_said_aloud(cache: OpenCache, tmp_path: Path) -> None:
    """Lines that are cut, malformed or point beyond the rows are forgotten; the others stay."""
    model = build()
    trunk = cache(model, tmp_path)
    gradients(model, trunk.loss, ORDERS[0])
    trunk.close()
    index = tmp_path / "index.jsonl"
    lines = index.read_text().splitlines()
    beyond = json.loads(lines[1]) | {"start": 10_000}
    index.write_text("\n".join([lines[0], json.dumps(beyond), *lines[2:5], lines[5][:20]]))
    events: list[str] = []
    trunk = cache(model, tmp_path, events)
    assert events == [f"trunk cache {tmp_path}: 2 of its documents are damaged; they are computed again"]
    gradients(model, trunk.loss, ORDERS[0])
    assert (trunk.documents_computed, trunk.documents_read) == (2, 4)
    trunk.close()
    trunk = cache(model, tmp_path, events)
    gradients(model, trunk.loss, ORDERS[0])
    assert (trunk.documents_computed, len(events)) == (0, 1)


def test_damaged_key_is_built_anew(cache: OpenCache, tmp_path: Path) -> None:
    """A key file that is no JSON, or no object, is another cache."""
    for content in ("{", "[]"):
        (tmp_path / "trunk.json").write_text(content)
        events: list[str] = []
        cache(build(), tmp_path, events).close()
        assert len(events) == 1
        assert f"trunk cache {tmp_path} is" in events[0]
        assert "is rebuilt" in events[0]


def test_differing_cache_is_found_out_and_left(cache: OpenCache, tmp_path: Path) -> None:
    """Rows that pass their checksum and are wrong all the same are caught by the check; the run goes on uncached."""
    model = build()
    trunk = cache(model, tmp_path)
    ids, targets, documents = packed(ORDERS[0])
    gradients(model, trunk.loss, ORDERS[0])
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    events: list[str] = []
    trunk._on_event = events.append
    assert torch.equal(trunk.loss(ids, targets, documents=documents), model.loss(ids, targets, documents=documents))
    assert not trunk.is_active
    assert len(events) == 1
    assert "states read from it differ from computed ones by" in events[0]
    read = trunk.documents_read
    trunk.loss(ids, targets, documents=documents)
    assert trunk.documents_read == read


def test_budget_ends_the_writing_and_not_the_run(cache: OpenCache, tmp_path: Path) -> None:
    """What does not fit is computed in every epoch, once said; the loss stays right."""
    model = build()
    events: list[str] = []
    trunk = cache(model, tmp_path, events, trunk_budget_gb=13 * 32 * 4 / 1e9)
    for order in ORDERS:
        torch.testing.assert_close(gradients(model, trunk.loss, order), gradients(model, model.loss, order))
    assert (tmp_path / "rows.bin").stat().st_size <= 13 * 32 * 4
    assert len(events) == 1
    assert "its budget of 1,664 bytes is spent after 3 documents; the others are computed in every epoch" in events[0]


def test_budget_too_small_for_the_data_is_an_error(tmp_path: Path) -> None:
    """Known beforehand, a budget that cannot hold the data is refused with the sizes and a way out that fits."""
    config = TrunkConfig(trunk_dir=tmp_path, trunk_budget_gb=0.4)
    with pytest.raises(
        ConfigError,
        match=r"^trunk_budget_gb must hold 10,000,000 tokens of 64 bytes, 0.64 GB, got 0.4; raise it, or set "
        r"trunk_rows = int8 \(0.36 GB\)$",
    ):
        TrunkCache(build(), config, tokenizer_hash="", expected_tokens=10_000_000)
    small = TrunkConfig(trunk_dir=tmp_path, trunk_budget_gb=1e-6)
    with pytest.raises(ConfigError, match=r"^.* 1,000 tokens of 64 bytes, 6.4e-05 GB, got 1e-06; raise it$"):
        TrunkCache(build(), small, tokenizer_hash="", expected_tokens=1000)


def test_full_disk_ends_the_writing_and_not_the_run(
    cache: OpenCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fills up is said once; another fault of the disk is not swallowed."""
    model = build()
    events: list[str] = []
    trunk = cache(model, tmp_path, events)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    torch.testing.assert_close(gradients(model, trunk.loss, ORDERS[0]), gradients(model, model.loss, ORDERS[0]))
    assert len(events) == 1
    assert "the disk is full after 0 documents" in events[0]

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "write", broken)
    with pytest.raises(MachineError, match="Input/output error"):
        cache(model, tmp_path / "other").loss(*packed(ORDERS[0])[:2], documents=packed(ORDERS[0])[2])


def test_two_runs_cannot_share_a_cache_at_once(cache: OpenCache, tmp_path: Path) -> None:
    """The second run is told to take another folder; after the first is gone it may have this one."""
    first = cache(build(), tmp_path)
    with pytest.raises(ConfigError, match=r"is in use by another run; give this one another folder$"):
        cache(build(), tmp_path)
    first.close()
    cache(build(), tmp_path).close()


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (LoraConfig(rank=2), r"^a trunk cache needs frozen layers below .* put adapters on the top layers only"),
        (
            LoraConfig(rank=2, layers="top:1", modules_to_save=("embed_tokens",)),
            r"^a trunk cache needs a frozen embedding, but model.embed_tokens.adapters.default is trained",
        ),
        (None, r"^a trunk cache needs a frozen embedding, but model.embed_tokens.weight is trained"),
    ],
)
def test_trained_trunk_is_refused(cache: OpenCache, lora: LoraConfig | None, message: str, tmp_path: Path) -> None:
    """Adapters in layer 0, a trained embedding and full fine-tuning have no frozen trunk."""
    with pytest.raises(ConfigError, match=message):
        cache(build(lora), tmp_path)


def test_cut_above_a_change_is_refused(tmp_path: Path) -> None:
    """A cut given by hand may not lie above a trained parameter, an adapter in use, or dropout."""

    def cut_at(model: Llama, cut: int) -> None:
        TrunkCache(model, TrunkConfig(trunk_dir=tmp_path), tokenizer_hash="", cut=cut)

    model = build()
    with pytest.raises(ConfigError, match=r"allows nothing trained below layer 4, but .*layers.3.*lora_A is"):
        cut_at(model, 4)
    set_adapter(model, "default")
    with pytest.raises(ConfigError, match=r"allows no adapter in use below layer 4, but .*q_proj has one"):
        cut_at(model, 4)
    model.model.layers[1].mlp.down_proj = nn.Sequential(model.model.layers[1].mlp.down_proj, nn.Dropout(0.1))
    with pytest.raises(ConfigError, match=r"allows no dropout below layer 3, but .*down_proj.1 has 0.1$"):
        cut_at(model, 3)


def test_highest_cut_is_the_lowest_trained_layer() -> None:
    """Adapters at rest do not count, trained norms and adapters in use do, a trained head alone leaves all layers."""
    model = build(LoraConfig(rank=2, layers=(2, 3)))
    assert highest_cut(model) == 2
    set_adapter(model, "default")
    assert highest_cut(model) == 2
    set_adapter(model, None)
    assert highest_cut(model) == 4
    model.model.layers[1].input_layernorm.weight.requires_grad_()
    assert highest_cut(model) == 1
    head = build(None).requires_grad_(requires_grad=False)
    head.lm_head.weight.requires_grad_()
    assert highest_cut(head) == 4


def test_documents_that_train_nothing_are_neither_computed_nor_kept(cache: OpenCache, tmp_path: Path) -> None:
    """Padding and wholly masked documents leave the cache empty, and their states are finite."""
    model = build(rms_norm_eps=0.0)
    trunk = cache(model, tmp_path)
    ids, targets, documents = packed(ORDERS[0])
    targets[1:] = -100
    loss = trunk.loss(ids, targets, documents=documents)
    torch.testing.assert_close(loss, model.loss(ids, targets, documents=documents))
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.requires_grad)
    assert len(trunk.store) == trunk.documents_computed == len(documents[0]) - 1


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("width", [24, 64, 96, 7])
def test_rows_come_back_within_their_bound(kind: str, width: int) -> None:
    """Encoding and decoding moves a row by at most `largest_error` of its norm, zeros and outliers included."""
    x = torch.randn(50, width, generator=torch.Generator().manual_seed(1))
    x[3] = 0
    x[4, 2] = 1e4
    x[5] *= 1e-30
    row_format = RowFormat(kind, width)
    rows = row_format.encode(x)
    assert rows.shape == (50, row_format.size_bytes)
    again = row_format.decode(rows, torch.float32)
    assert torch.equal(again[3], x[3])
    error = (again - x).norm(dim=1) / x.norm(dim=1).clamp_min(1e-38)
    assert float(error.max()) <= row_format.largest_error
    assert torch.equal(row_format.encode(again), rows) or kind == "int8"


def test_store_survives_a_torn_write_of_rows(tmp_path: Path) -> None:
    """Half a row at the end of the file, as a killed run leaves it, moves no later document."""
    row_bytes = RowFormat("float32", 2).size_bytes
    (tmp_path / "trunk.json").write_text("{}")
    (tmp_path / "rows.bin").write_bytes(b"x" * (row_bytes + 3))
    store = TrunkStore(tmp_path, {}, row_bytes, 1000, lambda _: None)
    rows = torch.arange(2 * row_bytes, dtype=torch.uint8).view(2, row_bytes)
    store.write("a", rows)
    store.close()
    again = TrunkStore(tmp_path, {}, row_bytes, 1000, lambda _: None)
    assert torch.equal(again.read("a", 2), rows)
    assert again.read("a", 1) is None
    again.close()


def test_a_second_adapter_at_rest_below_the_cut_is_no_obstacle(cache: OpenCache, tmp_path: Path) -> None:
    """Holding an adapter of all layers does not matter while the one in use sits on top."""
    model = build()
    states = copy.deepcopy(model)
    add_adapter(model, LoraConfig(rank=2), torch.Generator().manual_seed(3), "everywhere")
    trunk = cache(model, tmp_path)
    torch.testing.assert_close(gradients(model, trunk.loss, ORDERS[0])[0], gradients(states, states.loss, ORDERS[0])[0])
    assert trunk.cut == 3
