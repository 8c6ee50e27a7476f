"""Draw the next token from logits.

The order matches Hugging Face's generate, so the same settings give the same distribution: repetition penalty,
temperature, top-k, top-p, min-p. Sources: top-k (Fan 2018, arXiv:1805.04833), top-p (Holtzman 2019,
arXiv:1904.09751), min-p (Nguyen 2024, arXiv:2407.01082), repetition penalty (Keskar 2019, CTRL, arXiv:1909.05858,
section 4.1).
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def penalize_repetition(
    logits: Float[Tensor, "B V"], seen: Bool[Tensor, "B V"], penalty: float
) -> Float[Tensor, "B V"]:
    """Make seen tokens less likely: divide their positive logits by `penalty`, multiply their negative ones."""
    penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, penalized, logits)


def candidates(
    logits: Float[Tensor, "B V"],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> tuple[Float[Tensor, "B C"], Int[Tensor, "B C"]]:
    """Return the candidate tokens and their probabilities, 0 for those cut off, in no particular order.

    `top_k` keeps the most likely tokens; of these `top_p` keeps the fewest whose share reaches it; of these `min_p`
    keeps those at least that many times as likely as the most likely one, which is always kept.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # The largest becomes 0, so that no temperature makes it infinite.
    kept = (wide - wide.amax(-1, keepdim=True)) / temperature
    tokens = torch.arange(kept.shape[-1], device=kept.device).expand(kept.shape)
    if top_k is not None:
        kept, tokens = kept.topk(min(top_k, kept.shape[-1]), dim=-1)
    elif top_p < 1:
        kept, tokens = kept.sort(dim=-1, descending=True)
    probabilities = kept.softmax(-1)
    if top_p < 1:
        mass_before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(mass_before >= top_p, 0.0)
    if min_p > 0:
        probabilities = probabilities.masked_fill(probabilities < min_p * probabilities.amax(-1, keepdim=True), 0.0)
    return probabilities / probabilities.sum(-1, keepdim=True), tokens


def draw(
    probabilities: Float[Tensor, "B C"], tokens: Int[Tensor, "B C"], generator: torch.Generator
) -> Int[Tensor, " B"]:
    """Draw one of each row's tokens: the first whose cumulative probability exceeds a uniform number.

    It takes one number a row, where `torch.multinomial` draws one for each token of the vocabulary.
    """
    cumulated = probabilities.double().cumsum(-1)
    uniform = torch.rand(len(tokens), 1, dtype=torch.float64, generator=generator, device=generator.device)
    place = torch.searchsorted(cumulated, uniform.to(tokens.device) * cumulated[:, -1:], right=True)
    return tokens.gather(-1, place.clamp(max=tokens.shape[-1] - 1))[:, 0]
