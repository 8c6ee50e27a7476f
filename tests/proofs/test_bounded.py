"""Every case within a bound, run on the product: sequences to 16 tokens, widths to 64, all head counts.

Each statement is a function of a module, so that a copy of the module with an error planted can be asked too: the
statement must return a counter-example there.
"""

import importlib
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import product
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from ..mutants import mutant

pytestmark = pytest.mark.proof

SEQUENCE, WIDTH = 16, 64
Cases = Iterator[tuple[Any, bool]]  # each case with whether the statement holds


def divisors(number: int) -> list[int]:
    return [part for part in range(1, number + 1) if number % part == 0]


def partitions(length: int) -> np.ndarray:
    """Return the document ids of every way to cut a row of `length` tokens into documents, (2^(length-1), length)."""
    cuts = (np.arange(1 << (length - 1))[:, None] >> np.arange(length - 1)) & 1
    return np.concatenate((np.zeros((len(cuts), 1), dtype=int), cuts.cumsum(1)), axis=1)


def causal_masks(attention: ModuleType) -> Cases:
    """Query i of T sees key j of S where j ≤ i + S - T, and nothing else."""
    for keys in range(1, SEQUENCE + 1):
        for queries in range(1, keys + 1):
            want = np.arange(keys)[None, :] <= np.arange(queries)[:, None] + keys - queries
            yield (queries, keys), np.array_equal(attention.causal_mask(queries, keys).numpy(), want)


def query_blocks(attention: ModuleType) -> Cases:
    """The blocks hold every query once, and what they hide of the keys they look at is what the mask hides."""
    k = torch.empty(0)
    for keys, block_size in product(range(1, SEQUENCE + 1), range(1, SEQUENCE + 2)):
        for queries in range(1, keys + 1):
            seen = np.zeros((queries, keys), dtype=int)
            for block, length in attention.query_blocks(queries, keys, block_size):
                hidden = attention.hidden_keys(2 * (block.stop - block.start), block, length, k).numpy()
                seen[block, :length] += ~hidden.reshape(2, -1, length)[1]
            yield (queries, keys, block_size), np.array_equal(seen, np.tri(queries, keys, keys - queries, dtype=int))


def grouped_heads(attention: ModuleType) -> Cases:
    """Stacking the heads of each group as rows is undone, and puts head h into group h // (H/G)."""
    for heads, time in product(range(1, WIDTH + 1), (1, 3)):
        x = torch.arange(heads * time).reshape(1, heads, time, 1)
        for groups in divisors(heads):
            stacked = attention.group_heads(x, groups)
            right = all(
                set((stacked[0, g] // time // (heads // groups)).flatten().tolist()) == {g} for g in range(groups)
            )
            yield (heads, groups, time), right and torch.equal(attention.ungroup_heads(stacked, heads), x)


def document_spans(module: ModuleType) -> Cases:
    """For every way to cut a row: spans cover it once, in order, each one document; positions restart with each."""
    for length in range(1, SEQUENCE + 1):
        ids = partitions(length)
        documents = module.Documents.from_ids(torch.from_numpy(ids))
        starts = np.concatenate((np.ones((len(ids), 1), dtype=bool), np.diff(ids) != 0), axis=1)
        begun = np.maximum.accumulate(np.where(starts, np.arange(length), 0), axis=1)
        right = np.array_equal(documents.positions.numpy(), np.arange(length) - begun)
        for row, begins in zip(documents.spans, starts, strict=True):
            ends = [*np.flatnonzero(begins)[1:].tolist(), length]
            right = right and row == tuple(zip(np.flatnonzero(begins).tolist(), ends, strict=True))
        yield (length, len(ids)), right


def pieces(attention: ModuleType) -> Cases:
    """The pieces that the kernel sees hold every token of every row once, and never two documents."""
    for length in range(1, 13):
        ids = partitions(length)
        spans = attention.Documents.from_ids(torch.from_numpy(ids)).spans
        held = np.zeros_like(ids)
        for rows, _, times in attention.span_slices(len(ids), length, spans, by_row=False):
            held[rows, times] += 1
            if len(set(ids[rows, times].flat)) != 1:
                held[rows, times] = -1
        yield (length, len(ids)), bool((held == 1).all())


def packed_rows(packing: ModuleType) -> Cases:
    """Packing loses no example, takes none twice and overfills no row; each row but one is over half full."""
    bounds = [(capacity, 5) for capacity in range(1, 6)] + [(capacity, 3) for capacity in range(6, SEQUENCE + 1)]
    for capacity, most in bounds:
        for count in range(most + 1):
            for lengths in product(range(1, capacity + 1), repeat=count):
                rows = packing.pack(lengths, capacity)
                placed = sorted(index for row in rows for index in row)
                filled = sorted(sum(lengths[index] for index in row) for row in rows)
                right = placed == list(range(count)) and all(0 < size <= capacity for size in filled)
                yield (capacity, lengths), right and all(2 * size > capacity for size in filled[1:])


def packed_batches(sft_loader: ModuleType) -> Cases:
    """A packed batch holds each example's tokens in order under its own document id, and its own targets."""
    from entrenar.data.sft.encode import Example  # noqa: PLC0415

    for lengths in product(range(1, 5), repeat=3):
        starts = np.cumsum((0, *lengths))
        examples = [
            Example("", np.arange(100 * n, 100 * n + length + 1, dtype=np.int32), np.ones(length + 1, dtype=bool))
            for n, length in enumerate(lengths, start=1)
        ]
        batch = sft_loader.make_batch([examples, examples[:1]])
        documents, right = batch.documents[0], True
        for number, (start, example) in enumerate(zip(starts, examples, strict=False)):
            mine = slice(int(start), int(start) + example.num_inputs)
            right &= batch.input_ids[0, mine].tolist() == example.ids[:-1].tolist()
            right &= batch.targets[0, mine].tolist() == example.ids[1:].tolist()
            right &= documents[number] == (mine.start, mine.stop)
        right &= len(documents) == 3 and batch.documents[1] == ((0, lengths[0]), (lengths[0], sum(lengths)))
        right &= bool((batch.targets[1, lengths[0] :] == -100).all())
        yield lengths, right


def split_batches(batch: ModuleType) -> Cases:
    """However a batch is cut, its pieces are its rows in order, and their shares of the targets sum to one."""
    for rows, size in product(range(1, SEQUENCE + 1), range(1, SEQUENCE + 2)):
        ids = torch.arange(rows * 2).reshape(rows, 2)
        targets = torch.where((ids * 7 + rows) % 3 == 0, batch.IGNORED, ids)
        whole = batch.Batch(ids, targets, tuple(((0, 1), (1, row + 2)) for row in range(rows)), 0)
        parts = whole.split(size)
        right = torch.equal(torch.cat([part.input_ids for part in parts]), ids)
        right &= torch.equal(torch.cat([part.targets for part in parts]), targets)
        right &= tuple(spans for part in parts for spans in part.documents) == whole.documents
        right &= all(len(part.input_ids) <= size for part in parts)
        if whole.num_targets:
            right &= sum(Fraction(part.num_targets, whole.num_targets) for part in parts) == 1
        yield (rows, size), bool(right)


def row_blocks(blocks: ModuleType) -> Cases:
    """The blocks of an elementwise operation hold every row once, in order."""
    for rows, width in product(range(SEQUENCE + 1), range(WIDTH + 1)):
        cut = blocks.row_blocks(torch.empty(1).expand(rows, width * blocks.BLOCK_ELEMENTS // 12))
        held = [row for block in cut for row in range(block.start, block.stop)]
        yield (rows, width), held == list(range(rows))


def nearest_codes(nf4: ModuleType) -> Cases:
    """Every bfloat16 in [-1, 1], and the float32 neighbors of every threshold, go to a nearest level, but for ties."""
    book = nf4.nf4_code_book().double()
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    near = ((book[:-1] + book[1:]) / 2).float().view(torch.int32)[:, None] + torch.arange(-300, 301, dtype=torch.int32)
    numbers = torch.cat((bits[bits.abs() <= 1], near.view(torch.float32).flatten().clamp(-1, 1)))
    padded = torch.nn.functional.pad(numbers, (0, -len(numbers) % 63)).view(-1, 63)
    blocks = torch.cat((torch.ones(len(padded), 1), padded), dim=1)  # the magnitude of each block is 1
    weight = nf4.quantize_nf4(blocks)
    codes = torch.stack((weight.codes >> 4, weight.codes & 15), dim=1).view(-1, 64)[:, 1:].flatten()[: len(numbers)]
    distance = (numbers.double() - book[codes.long()]).abs()
    least = (numbers.double()[:, None] - book).abs().amin(1)
    wrong = (distance > least + 2**-24).nonzero()
    yield numbers[wrong[0]] if len(wrong) else len(numbers), not len(wrong)


def attention_shapes(ops: ModuleType) -> Cases:
    """Output and gradients have the shapes of what they are of, and a gradient never reaches a later token."""
    for width in range(1, WIDTH + 1):
        for heads in divisors(width):
            for groups, time in product(divisors(heads), (1, 2, 7, SEQUENCE)):
                shapes = [(1, count, time, width // heads) for count in (heads, groups, groups)]
                inputs = [torch.ones(shape).requires_grad_() for shape in shapes]
                y = ops.attention(*inputs)
                grads = torch.autograd.grad(y[:, :, 0].sum(), inputs)
                right = y.shape == shapes[0] and [tuple(grad.shape) for grad in grads] == shapes
                yield (width, heads, groups, time), right and not any(grad[:, :, 1:].any() for grad in grads)


# The statement, its module, what a twin changes, and the bound in words.
STATEMENTS: dict[str, tuple[Callable[[ModuleType], Cases], str, tuple[str, str], str]] = {
    "causal masks": (causal_masks, "ops.attention", (
        "tril(num_keys - num_queries)", "tril(num_keys - num_queries + 1)"), "T ≤ S ≤ 16"),
    "query blocks": (query_blocks, "ops.attention", (
        "end + num_keys - num_queries) for", "end) for"), "T ≤ S ≤ 16, blocks to 17"),
    "grouped heads": (grouped_heads, "ops.attention", (
        "x.shape[0], groups, x.shape[1] // groups * x.shape[2], x.shape[3])",
        "x.shape[0], x.shape[1] // groups * x.shape[2], groups, x.shape[3]).transpose(1, 2)"), "H ≤ 64, all G"),
    "document spans": (document_spans, "ops.documents", (
        "np.flatnonzero(step)", "np.flatnonzero(step[1:])"),
        "T ≤ 16, all cuts into documents"),
    "pieces of a packed batch": (pieces, "ops.attention", (
        "for start, end in ends\n    ]", "for start, end in ends[:-1] or ends\n    ]"), "T ≤ 12, all cuts"),
    "packing": (packed_rows, "data.sft.packing", ("left = room - length", "left = room - length + (room > length)"),
        "capacity ≤ 5 and 5 examples, capacity ≤ 16 and 3"),
    "packed batches": (packed_batches, "data.sft.loader", (
        "edges if edges[-1] == length else [*edges, length]", "edges"),
        "3 examples of 1 to 4 tokens"),
    "split batches": (split_batches, "data.batch", (
        "self.targets[at : at + rows]", "self.targets[at : at + rows - 1]"), "B ≤ 16, pieces of up to 17 rows"),
    "row blocks": (row_blocks, "ops.row_blocks", (
        "slice(start, min(start + size, num_rows))", "slice(start, min(start + size - 1, num_rows))"),
        "N ≤ 16, widths to 64"),
    "nearest codes": (nearest_codes, "ops.quantized.nf4", (
        "thresholds = (book[:-1] + book[1:]) / 2", "thresholds = book[:-1] * 0.4 + book[1:] * 0.6"),
        "every bfloat16 in [-1, 1], 9,015 float32 at the thresholds"),
    "attention shapes": (attention_shapes, "ops.attention", (
        "*inputs, logsumexp, 0.0, is_causal=True", "*inputs, logsumexp, 0.0, is_causal=False"),
        "widths to 64, all H and G, T in 1, 2, 7, 16"),
}  # fmt: skip


@pytest.mark.parametrize("name", STATEMENTS)
def test_the_statement_holds_in_every_case(name, certificate):
    """No case within the bound contradicts it, and there are cases."""
    statement, module, _, bound = STATEMENTS[name]
    count, wrong = 0, []
    for case, right in statement(importlib.import_module(f"entrenar.{module}")):
        count += 1
        wrong += [] if right else [case]
    assert not wrong[:3]
    assert count > 0
    floor, *_, file = module.split(".")
    if floor == "ops":
        op = "attention" if file == "documents" else file
        certificate.add(op, "shapes", statement=name, bound=bound, cases=count)


@pytest.mark.parametrize("name", STATEMENTS)
def test_a_broken_twin_yields_a_counter_example(name):
    """With an error planted in the module, some case contradicts the statement."""
    statement, module, twin, _ = STATEMENTS[name]
    assert not all(right for _, right in statement(mutant(f"entrenar.{module}", twin)))
