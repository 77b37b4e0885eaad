import collections
import math
import os
import pathlib

import numpy as np
import pytest

from jaxaudio.data.chorales import encode_grid
from jaxaudio.data.ngrams import ladder


def _pieces(count, seed, num_steps=24):
    """Random walks with held notes over few pitches, so that contexts repeat; some pieces have a pick-up beat."""
    rng = np.random.default_rng(seed)
    pieces = []
    for index in range(count):
        moves = rng.integers(-1, 2, (num_steps + 4 * (index % 2), 4)) * (
            rng.random((num_steps + 4 * (index % 2), 4)) < 0.4
        )
        pieces.append((10 * np.arange(1, 5)[::-1] + np.clip(np.cumsum(moves, 0), -2, 2)).astype(np.int32).reshape(-1))
    return pieces


def _contexts(tokens, i):
    """Of token i, from the shortest to the longest."""
    voice, step = i % 4, i // 4
    chord = tuple(tokens[4 * step - 4 : 4 * step].tolist()) if step else None
    previous = chord[voice] if step else None
    return [
        voice,
        (voice, previous),
        (voice, previous, step % 4),
        (voice, chord, tuple(tokens[4 * step : i]), step % 4),
    ]


def _slow_ladder(train, evaluation):
    """The same in dictionaries and loops: counts, leave-one-piece-out, expectation maximisation, score."""
    held_out = [[1 / 47] * len(tokens) for tokens in train]
    scores = [[1 / 47] * len(tokens) for tokens in evaluation]
    rungs = []
    for level in range(4):
        counts = [collections.Counter() for _ in train]
        for own, tokens in zip(counts, train, strict=True):
            for i, token in enumerate(tokens.tolist()):
                context = _contexts(tokens, i)[level]
                own.update([(context,), (context, token)])
        total = sum(counts, collections.Counter())

        def estimate(tokens, i, own, level=level, total=total):
            context, token = _contexts(tokens, i)[level], int(tokens[i])
            n = total[context,] - own[context,]
            return (total[context, token] - own[context, token]) / n if n else 0.0, n.bit_length()

        observed = [
            (*estimate(tokens, i, own), held_out[piece][i])
            for piece, (tokens, own) in enumerate(zip(train, counts, strict=True))
            for i in range(len(tokens))
        ]
        size = max(bucket for _, bucket, _ in observed) + 1
        weights = [0.5] * size
        for _ in range(100):
            shares, seen = [0.0] * size, [1] * size
            for p, bucket, lower in observed:
                w = weights[bucket]
                shares[bucket] += w * p / (w * p + (1 - w) * lower)
                seen[bucket] += 1
            weights = [share / n for share, n in zip(shares, seen, strict=True)]
        weights[0] = 0.0

        def mix(tokens, i, own, lower, estimate=estimate, weights=weights):
            p, bucket = estimate(tokens, i, own)
            w = weights[min(bucket, len(weights) - 1)]
            return w * p + (1 - w) * lower

        none = collections.Counter()
        held_out = [
            [mix(t, i, own, low[i]) for i in range(len(t))] for t, own, low in zip(train, counts, held_out, strict=True)
        ]
        scores = [[mix(t, i, none, low[i]) for i in range(len(t))] for t, low in zip(evaluation, scores, strict=True)]
        losses = [-math.log(p) for piece in scores for p in piece]
        rungs.append(sum(losses) / len(losses))
    return rungs


def test_equals_loops_over_dictionaries():
    train, evaluation = _pieces(6, seed=0), _pieces(3, seed=1)
    evaluation[0][5] = 47  # a pitch that training has not
    expected = _slow_ladder(train, evaluation)
    np.testing.assert_allclose([rung.nats_per_token for rung in ladder(train, evaluation)], expected, rtol=1e-10)


def test_unigram_of_one_repeated_chord_by_hand():
    """Every held-out estimate is 1, so w grows towards its bound n / (n + 1), n = 2 pieces of 8 tokens."""
    piece = np.array([40, 30, 20, 10] * 2, np.int32)
    unigram = ladder([piece, piece], [piece])[0]
    w = 0.5
    for _ in range(100):
        w = 16 / 17 * w / (w + (1 - w) / 47)
    assert unigram.nats_per_token == pytest.approx(-math.log(w + (1 - w) / 47), abs=1e-12)


def test_evaluation_chorales_are_only_scored():
    """The loss of a split is the mean over its tokens of the losses of its pieces, each scored on its own."""
    train, evaluation = _pieces(6, seed=0), _pieces(4, seed=1)
    together = [rung.nats_per_token for rung in ladder(train, evaluation)]
    alone = [[rung.nats_per_token for rung in ladder(train, [piece])] for piece in evaluation]
    np.testing.assert_allclose(together, np.average(alone, axis=0, weights=[len(p) for p in evaluation]), rtol=1e-12)


def test_names_say_what_a_rung_knows():
    names = [rung.name for rung in ladder(_pieces(2, seed=0), _pieces(1, seed=1))]
    assert names == [
        "voice unigram",
        "+ previous pitch of the same voice",
        "+ position in the beat",
        "previous chord + current partial chord + position in the beat",
    ]


def test_unusable_sequences():
    pieces = _pieces(2, seed=0)
    with pytest.raises(ValueError, match="two training pieces and one to evaluate; got 1 and 2"):
        ladder(pieces[:1], pieces)
    with pytest.raises(ValueError, match=r"Sequence 1 .* shape \(7,\)"):
        ladder([pieces[0], pieces[1][:7]], pieces)
    with pytest.raises(ValueError, match=r"Sequence 0 .* ids 1\.\.47"):
        ladder(pieces, [pieces[0] * 0])


@pytest.mark.skipif("JAXAUDIO_DATA" not in os.environ, reason="JAXAUDIO_DATA names no folder with the JSB chorales")
def test_jsb_agrees_with_another_fit():
    """The first rungs of an independently made n-gram ladder with other interpolation weights."""
    from jaxaudio.data.jsb_chorales import find_source, read_source

    splits = read_source(find_source(pathlib.Path(os.environ["JAXAUDIO_DATA"])))
    tokens = {split: [encode_grid(grid) for grid in grids] for split, grids in splits.items()}
    for split, expected in {"valid": (2.611, 0.934, 0.712), "test": (2.639, 0.984, 0.745)}.items():
        rungs = [rung.nats_per_token for rung in ladder(tokens["train"], tokens[split])]
        np.testing.assert_allclose(rungs[:3], expected, atol=0.005)
        assert rungs[3] < rungs[2]
