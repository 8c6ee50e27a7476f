"""A forward pass in numpy over llama2.c's files, written from the description of the format and of its program.

Nothing here is the product's. One token at a time as in `run.c`: rotary pairs are neighbours, attention is grouped.
"""

import struct

import numpy as np


def read(path):
    """Return the header's numbers and the weights by Meta's names, those of a layer stacked."""
    raw = path.read_bytes()
    is_new = raw[:4] == struct.pack("<I", 0x616B3432)
    version = struct.unpack_from("<i", raw, 4)[0] if is_new else 0
    dim, hidden, layers, heads, kv_heads, vocab, seq = struct.unpack_from("<7i", raw, 8 if is_new else 0)
    shared = bool(raw[36]) if is_new else vocab > 0
    group = struct.unpack_from("<i", raw, 37)[0] if version == 2 else 0
    vocab, width = abs(vocab), dim // heads
    shapes = {
        "emb": (vocab, dim), "att_norm": (layers, dim), "wq": (layers, dim, dim), "wk": (layers, kv_heads * width, dim),
        "wv": (layers, kv_heads * width, dim), "wo": (layers, dim, dim), "ffn_norm": (layers, dim),
        "w1": (layers, hidden, dim), "w2": (layers, dim, hidden), "w3": (layers, hidden, dim), "norm": (dim,),
        "freqs": (seq, width), "head": (vocab, dim),
    }  # fmt: skip
    old = "emb att_norm wq wk wv wo ffn_norm w1 w2 w3 norm freqs"
    new = "att_norm ffn_norm norm emb wq wk wv wo w1 w2 w3"
    at, weights = (256 if is_new else 28), {}
    for name in (new if is_new else old).split() + ([] if shared else ["head"]):
        is_stack = len(shapes[name]) == 3 or name.endswith("_norm")
        parts = []
        for _ in range(layers if is_stack else 1):
            shape = shapes[name][1:] if is_stack else shapes[name]
            count = int(np.prod(shape))
            if group and "norm" not in name:
                q = np.frombuffer(raw, np.int8, count, at).reshape(-1, group).astype(np.float64)
                s = np.frombuffer(raw, "<f4", count // group, at + count)
                parts.append((q * s[:, None]).reshape(shape))
                at += count + 4 * (count // group)
            else:
                parts.append(np.frombuffer(raw, "<f4", count, at).reshape(shape).astype(np.float64))
                at += 4 * count
        weights[name] = np.stack(parts) if is_stack else parts[0]
    assert at == len(raw), "the whole file is read"
    weights.setdefault("head", weights["emb"])
    return (dim, layers, heads, kv_heads, width), weights


def norm(x, weight):
    return weight * x / np.sqrt(np.mean(x * x) + 1e-5)


def turn(x, position):
    width = x.shape[-1]
    angle = position / 10000.0 ** (np.arange(0, width, 2) / width)
    even, odd = x[:, 0::2], x[:, 1::2]
    return np.stack(
        [even * np.cos(angle) - odd * np.sin(angle), even * np.sin(angle) + odd * np.cos(angle)], -1
    ).reshape(x.shape)


def logits(path, tokens):
    """Return the logits after each token."""
    (_, layers, heads, kv_heads, width), w = read(path)
    keys, values = [[] for _ in range(layers)], [[] for _ in range(layers)]
    out = []
    for position, token in enumerate(tokens):
        x = w["emb"][token]
        for n in range(layers):
            h = norm(x, w["att_norm"][n])
            q = turn((w["wq"][n] @ h).reshape(heads, width), position)
            keys[n].append(turn((w["wk"][n] @ h).reshape(kv_heads, width), position))
            values[n].append((w["wv"][n] @ h).reshape(kv_heads, width))
            k, v = (np.repeat(np.stack(kept), heads // kv_heads, axis=1) for kept in (keys[n], values[n]))
            score = np.einsum("hk,thk->ht", q, k) / np.sqrt(width)
            share = np.exp(score - score.max(-1, keepdims=True))
            share /= share.sum(-1, keepdims=True)
            x = x + w["wo"][n] @ np.einsum("ht,thk->hk", share, v).reshape(-1)
            h = norm(x, w["ffn_norm"][n])
            gate = w["w1"][n] @ h
            x = x + w["w2"][n] @ (gate / (1 + np.exp(-gate)) * (w["w3"][n] @ h))
        out.append(w["head"] @ norm(x, w["norm"]))
    return np.stack(out)
