"""Run sentencepiece's BPE on a list of pieces and scores, like llama.cpp and llama2.c.

For verification: it shows that the *scores* in a written file merge as the tokenizer does, which a comparison of
tokens cannot. Written from `llm_tokenizer_spm` in llama-vocab.cpp; slow.
"""

from collections.abc import Sequence

_NORMAL, _USER_DEFINED, _UNUSED, _BYTE = 1, 4, 5, 6


class PieceEncoder:
    """Encodes text with pieces and scores."""

    def __init__(
        self, tokens: Sequence[str], scores: Sequence[float], kinds: Sequence[int], unknown: int, *, adds_space: bool
    ) -> None:
        self._ids = {token: index for index, token in enumerate(tokens) if kinds[index] in (_NORMAL, _USER_DEFINED)}
        self._scores = scores
        self._bytes = {int(token[3:5], 16): index for index, token in enumerate(tokens) if kinds[index] == _BYTE}
        self._unknown = unknown
        self._adds_space = adds_space

    def __call__(self, text: str) -> list[int]:
        """Return the ids of `text`, without BOS."""
        if not text:
            return []
        symbols = list(("▁" if self._adds_space else "") + text.replace(" ", "▁"))
        while True:
            best, best_at = float("-inf"), -1
            for at in range(len(symbols) - 1):
                index = self._ids.get(symbols[at] + symbols[at + 1])
                if index is not None and self._scores[index] > best:
                    best, best_at = self._scores[index], at
            if best_at < 0:
                break
            symbols[best_at : best_at + 2] = [symbols[best_at] + symbols[best_at + 1]]
        ids: list[int] = []
        for symbol in symbols:
            if symbol in self._ids:
                ids.append(self._ids[symbol])
            elif self._bytes:
                ids += [self._bytes[byte] for byte in symbol.encode()]
            elif ids[-1:] != [self._unknown]:  # a run of unknown characters is one unknown token
                ids.append(self._unknown)
        return ids
