"""Entropy coding of symbols with integer frequency tables: a range coder in exact integers, so in equal bytes anywhere.

The coder is the range variant of asymmetric numeral systems (Duda 2013, arXiv 1311.2540, section 2.4): one integer
`state` holds what is coded, and moves as much as its symbols' frequencies say. The decoder goes forwards, symbol by
symbol, so the table of a symbol may depend on all symbols before it; the encoder keeps what it was given and goes
backwards when it finishes. No floating-point number occurs here.

A table of symbols 0..C-1 is its cumulative counts (C + 1,): 0, then rising to 2**bits. A symbol of count n costs
bits - log2(n) bits; one of count 0 cannot be coded. What is lost beside the entropy: 5 bytes per stream, and up to
2**(bits - 32) of the rest (nothing that shows for 16 bits, at most 0.4 % for 24).
"""

import numpy as np

MAX_BITS = 24
_FLOOR_BITS = 32  # between two symbols the state is in [2**32, 2**40)
_STATE_BYTES = 5
OVERHEAD_BYTES = _STATE_BYTES
"""What a stream takes beside its symbols' information."""


class CodingError(ValueError):
    """A table that is none, a symbol that has no place in it, or bytes that were not coded with the tables given."""


class Encoder:
    """Codes symbols in the order in which `put` takes them.

    Args:
      bits: Every table's counts sum to 2**bits.
    """

    def __init__(self, bits: int):
        self._bits = _checked_bits(bits)
        self._starts: list[int] = []
        self._counts: list[int] = []

    def put(self, symbols: np.ndarray, cumulative: np.ndarray) -> None:
        """Takes N symbols, each with its own table.

        Args:
          symbols: Integers (N,).
          cumulative: Integers (N, C + 1), the cumulative counts of symbol n's table in row n.
        Raises:
          CodingError: a row is not a table of 2**bits, or a symbol is outside of its table or has the count 0 in it;
            has the row and the values.
        """
        _check_tables(cumulative, self._bits)
        num_symbols = cumulative.shape[1] - 1
        if symbols.shape != cumulative.shape[:1] or symbols.dtype.kind not in "iu":
            raise CodingError(
                f"expected integers ({len(cumulative)},), a symbol for each row of cumulative {cumulative.shape}, got "
                f"{symbols.dtype} {symbols.shape}"
            )
        outside = (symbols < 0) | (symbols >= num_symbols)
        if outside.any():
            row = int(outside.argmax())
            raise CodingError(f"symbol {symbols[row]} in row {row}: its table has the symbols 0 to {num_symbols - 1}")
        rows, symbols = np.arange(len(symbols)), symbols.astype(np.int64)
        starts = cumulative[rows, symbols]
        counts = cumulative[rows, symbols + 1] - starts
        if not counts.all():
            row = int((counts == 0).argmax())
            raise CodingError(f"symbol {symbols[row]} in row {row} has the count 0; expected 1 or more")
        self._starts += starts.tolist()
        self._counts += counts.tolist()

    def finish(self) -> bytes:
        """The stream of all symbols taken."""
        bits, state, tail = self._bits, 1 << _FLOOR_BITS, bytearray()
        shift = _FLOOR_BITS + 8 - bits
        for start, count in zip(reversed(self._starts), reversed(self._counts), strict=True):
            while state >= count << shift:
                tail.append(state & 0xFF)
                state >>= 8
            whole, rest = divmod(state, count)
            state = (whole << bits) + rest + start
        tail.reverse()
        return state.to_bytes(_STATE_BYTES, "big") + bytes(tail)


class Decoder:
    """Reads a stream of `Encoder`.

    Args:
      stream: All bytes of the stream.
      bits: As the encoder's.
    Raises:
      CodingError: the stream is shorter than any, or begins as none does.
    """

    def __init__(self, stream: bytes, bits: int):
        self._bits = _checked_bits(bits)
        self._stream, self._at = stream, _STATE_BYTES
        self._state = int.from_bytes(stream[:_STATE_BYTES], "big")
        if len(stream) < _STATE_BYTES:
            raise CodingError(f"{len(stream)} bytes of coded symbols; expected {_STATE_BYTES} or more")
        if self._state < 1 << _FLOOR_BITS:
            raise CodingError(f"coded symbols begin with {stream[:_STATE_BYTES].hex()}; never with 00")

    def get(self, cumulative: np.ndarray) -> np.ndarray:
        """The next N symbols.

        Args:
          cumulative: As `Encoder.put` was given for these symbols.
        Returns:
          int32 (N,).
        Raises:
          CodingError: a row is not a table, or the stream ends before the last symbol, as one cut short does.
        """
        _check_tables(cumulative, self._bits)
        cumulative = cumulative.astype(np.int64, copy=False)  # else searchsorted converts it row by row
        bits, state, stream, at = self._bits, self._state, self._stream, self._at
        mask, floor = (1 << bits) - 1, 1 << _FLOOR_BITS
        symbols = np.empty(len(cumulative), np.int32)
        for row, table in enumerate(cumulative):
            slot = state & mask
            symbol = int(table.searchsorted(slot, "right")) - 1
            start = int(table[symbol])
            state = (int(table[symbol + 1]) - start) * (state >> bits) + slot - start
            while state < floor:
                if at == len(stream):
                    raise CodingError(f"the {at} bytes end before the last symbol; they were cut short")
                state = state << 8 | stream[at]
                at += 1
            symbols[row] = symbol
        self._state, self._at = state, at
        return symbols

    def finish(self) -> None:
        """Checks that the stream ends with the symbols read so far.

        It sees nearly all damage, not all: some damaged streams are streams of other symbols.

        Raises:
          CodingError: bytes are left, or the bytes are damaged or were coded with other tables.
        """
        if self._at != len(self._stream) or self._state != 1 << _FLOOR_BITS:
            raise CodingError(
                f"the symbols end at byte {self._at} of {len(self._stream)} with the state {self._state:#x}; expected "
                f"the last byte and {1 << _FLOOR_BITS:#x}: the bytes are damaged, or were coded with other tables"
            )


def _checked_bits(bits: int) -> int:
    if not 1 <= bits <= MAX_BITS:
        raise CodingError(f"bits={bits}; expected 1 to {MAX_BITS}")
    return bits


def _check_tables(cumulative: np.ndarray, bits: int) -> None:
    if cumulative.ndim != 2 or cumulative.shape[1] < 2 or cumulative.dtype.kind not in "iu":
        raise CodingError(f"expected cumulative counts, integers (N, C + 1), got {cumulative.dtype} {cumulative.shape}")
    is_table = (cumulative[:, 0] == 0) & (cumulative[:, -1] == 1 << bits)
    is_table &= (cumulative[:, 1:] >= cumulative[:, :-1]).all(axis=1)
    if not is_table.all():
        row = int((~is_table).argmax())
        raise CodingError(
            f"row {row} of cumulative runs from {cumulative[row, 0]} to {cumulative[row, -1]}; expected it to begin "
            f"with 0, never to fall, and to end with 2**{bits} = {1 << bits}"
        )
