"""Sizes against Shannon's entropy, round trips over hostile tables, and streams that are not what they should be."""

import math
import re

import numpy as np
import pytest

from jaxaudio.data.arithmetic_coding import MAX_BITS, OVERHEAD_BYTES, CodingError, Decoder, Encoder


def random_tables(rng: np.random.Generator, num: int, num_symbols: int, bits: int, least: int = 1) -> np.ndarray:
    """Tables of every kind from flat to nearly certain, each count at least `least`; the first takes the rest."""
    weights = rng.random((num, num_symbols)) ** rng.choice([0.1, 1.0, 8.0, 60.0], (num, 1))
    free = (1 << bits) - least * num_symbols
    counts = least + np.floor(free * weights / weights.sum(1, keepdims=True)).astype(np.int64)
    counts[:, 0] += (1 << bits) - counts.sum(1)
    return np.concatenate([np.zeros((num, 1), np.int64), counts.cumsum(1)], axis=1)


def coded(symbols: np.ndarray, tables: np.ndarray, bits: int) -> bytes:
    encoder = Encoder(bits)
    encoder.put(symbols, tables)
    return encoder.finish()


def round_trip(symbols: np.ndarray, tables: np.ndarray, bits: int) -> bytes:
    stream = coded(symbols, tables, bits)
    decoder = Decoder(stream, bits)
    np.testing.assert_array_equal(decoder.get(tables), symbols)
    decoder.finish()
    return stream


@pytest.mark.parametrize("bits", [12, 16, 20, MAX_BITS])
def test_the_size_is_the_entropy(bits):
    rng = np.random.default_rng(bits)
    counts = np.diff(random_tables(rng, 1, 300, bits)[0])
    symbols = rng.choice(300, 100_000, p=counts / counts.sum())
    tables = np.broadcast_to(np.concatenate([[0], counts.cumsum()]), (1000, 301))
    encoder = Encoder(bits)
    for block in symbols.reshape(100, 1000):
        encoder.put(block, tables)
    stream = encoder.finish()
    information = sum(bits - math.log2(counts[symbol]) for symbol in symbols) / 8
    assert information <= len(stream) <= 1.001 * information + OVERHEAD_BYTES + 1
    decoder = Decoder(stream, bits)
    for block in symbols.reshape(100, 1000):
        np.testing.assert_array_equal(decoder.get(tables), block)
    decoder.finish()


@pytest.mark.parametrize("seed", range(40))
def test_round_trip_over_random_tables(seed):
    rng = np.random.default_rng(seed)
    bits = int(rng.integers(1, MAX_BITS + 1))
    num_symbols = int(rng.integers(1, min(1 << bits, 70) + 1))
    num = int(rng.integers(0, 200))
    tables = random_tables(rng, num, num_symbols, bits)
    round_trip(rng.integers(0, num_symbols, num), tables, bits)


@pytest.mark.parametrize("bits", [1, 8, 16, MAX_BITS])
def test_round_trip_over_the_most_certain_tables(bits):
    """The least likely symbol, 1 of 2**bits, again and again; the likeliest; both mixed; and no choice at all."""
    total, rng = 1 << bits, np.random.default_rng(0)
    edge = np.array([[0, 1, total], [0, total - 1, total]])
    for symbols in (np.zeros(500, int), np.ones(500, int), rng.integers(0, 2, 500)):
        for tables in (edge[np.zeros(500, int)], edge[np.ones(500, int)], edge[rng.integers(0, 2, 500)]):
            stream = round_trip(symbols, tables, bits)
            counts = np.diff(tables)[np.arange(500), symbols]
            assert len(stream) <= 1.001 * float((bits - np.log2(counts)).sum()) / 8 + OVERHEAD_BYTES + 1
    assert len(round_trip(np.zeros(500, int), np.tile([0, total], (500, 1)), bits)) == OVERHEAD_BYTES


def test_symbols_of_count_0_are_never_decoded():
    tables = np.tile([0, 0, 7, 7, 7, 256, 256], (300, 1))
    round_trip(np.random.default_rng(0).choice([1, 4], 300), tables, 8)


def test_a_table_may_depend_on_what_was_decoded():
    rng, bits = np.random.default_rng(3), 12
    tables = random_tables(rng, 8, 8, bits)
    symbols = rng.integers(0, 8, (50, 3))
    encoder, before = Encoder(bits), np.zeros(3, int)
    for frame in symbols:
        encoder.put(frame, tables[before])
        before = frame
    decoder, before = Decoder(encoder.finish(), bits), np.zeros(3, int)
    for frame in symbols:
        before = decoder.get(tables[before])
        np.testing.assert_array_equal(before, frame)
    decoder.finish()


def test_a_stream_by_hand():
    """Counts 1, 1, 2 of 4. Backwards: symbol 1 takes the state 2**32 to 2**34 + 1, and symbol 2 that to 2**35 + 3."""
    stream = coded(np.array([2, 1]), np.tile([0, 1, 2, 4], (2, 1)), 2)
    assert int.from_bytes(stream, "big") == 2**35 + 3


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int64, np.uint64])
@pytest.mark.parametrize("symbol_dtype", [np.uint8, np.int32])
def test_the_bytes_do_not_depend_on_the_dtypes(dtype, symbol_dtype):
    tables = random_tables(np.random.default_rng(0), 100, 256, 16)
    symbols = np.random.default_rng(1).integers(0, 256, 100)
    symbols[0] = 255
    stream = round_trip(symbols.astype(symbol_dtype), tables.astype(dtype), 16)
    assert stream == coded(symbols, tables, 16)


def test_a_stream_cut_short_raises_wherever_it_is_cut():
    rng = np.random.default_rng(0)
    tables = random_tables(rng, 200, 40, 16)
    stream = coded(rng.integers(0, 40, 200), tables, 16)
    for length in range(len(stream)):
        with pytest.raises(CodingError, match=f"{length} bytes" if length < 5 else f"the {length} bytes end before"):
            Decoder(stream[:length], 16).get(tables)


def test_bytes_left_over_or_changed_are_seen_at_the_end():
    rng = np.random.default_rng(0)
    tables = random_tables(rng, 200, 40, 16)
    stream = coded(rng.integers(0, 40, 200), tables, 16)
    for data, message in ((stream + b"\0", f"byte {len(stream)} of {len(stream) + 1}"), (stream, "expected the last")):
        decoder = Decoder(data, 16)
        decoder.get(tables if data is not stream else tables[:-1])
        with pytest.raises(CodingError, match=message):
            decoder.finish()
    num_missed = 0  # what is left are streams of other symbols; only a checksum tells those
    for position in range(len(stream)):
        damaged = bytearray(stream)
        damaged[position] ^= 1 << position % 8
        try:
            decoder = Decoder(bytes(damaged), 16)
            decoder.get(tables)
            decoder.finish()
            num_missed += 1
        except CodingError:
            pass
    assert num_missed <= 0.05 * len(stream)


def test_wrong_use_is_refused_with_the_value():
    good = np.array([[0, 3, 4]])
    for bits in (0, MAX_BITS + 1):
        with pytest.raises(CodingError, match=f"bits={bits}; expected 1 to {MAX_BITS}"):
            Encoder(bits)
        with pytest.raises(CodingError, match=f"bits={bits}"):
            Decoder(b"\1" * 8, bits)
    with pytest.raises(CodingError, match="begin with 0000000000"):
        Decoder(bytes(8), 2)
    for table, values in (([[0, 3, 5]], "from 0 to 5"), ([[1, 3, 4]], "from 1 to 4"), ([[0, 5, 4]], "row 0 .* never")):
        with pytest.raises(CodingError, match=values):
            Encoder(2).put(np.array([0]), np.array(table))
        with pytest.raises(CodingError, match=values):
            Decoder(b"\1" * 8, 2).get(np.array(table))
    for table, values in ((good[0], "int64 (3,)"), (good.astype(float), "float64 (1, 3)"), (good[:, :1], "(1, 1)")):
        with pytest.raises(CodingError, match=re.escape(values)):
            Encoder(2).put(np.array([0]), table)
    for symbols, values in (([2], "symbol 2 in row 0: .* 0 to 1"), ([-1], "symbol -1"), ([0, 1], r"got int64 \(2,\)")):
        with pytest.raises(CodingError, match=values):
            Encoder(2).put(np.array(symbols), good)
    with pytest.raises(CodingError, match="symbol 1 in row 0 has the count 0"):
        Encoder(2).put(np.array([1]), np.array([[0, 4, 4]]))
