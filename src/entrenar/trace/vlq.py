"""Read variable-length quantities in base 64, the numbers of source maps (ECMA-426, section 6)."""

_DIGITS = {
    character: value
    for value, character in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")
}
_MORE = 0b100000
_BITS = 5


def decode(text: str) -> list[int]:
    """Return the signed numbers of a segment.

    Raises: ValueError for a character that is no digit, a number that is cut off, or one beyond 32 bits.
    """
    numbers = []
    value = shift = 0
    for character in text:
        digit = _DIGITS.get(character)
        if digit is None:
            raise ValueError(f"{character!r} is no base-64 digit")
        value |= (digit & ~_MORE) << shift
        shift += _BITS
        if value >> 33:
            raise ValueError(f"{text!r} holds a number beyond 32 bits")
        if not digit & _MORE:
            numbers.append(-(value >> 1) if value & 1 else value >> 1)
            value = shift = 0
    if shift:
        raise ValueError(f"{text!r} ends inside a number")
    return numbers
