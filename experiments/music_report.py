"""What the pages of Music Transformers share: pieces to hear and see, and attention drawn over their notes."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxaudio.data.midi import Note
from jaxaudio.data.pipelines import token_window
from jaxaudio.models.music_transformer import MusicTransformer
from jaxaudio.report import page, plots

MARGIN_S = 1.0  # that a picture of attention shows after its note


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """A generated piece: its tokens, notes and sound, and the second at which its prime ends (None without one)."""

    name: str
    tokens: np.ndarray
    notes: tuple[Note, ...]
    waveform: np.ndarray
    prime_end_s: float | None


def side_by_side(rows: Mapping[str, Sequence[Piece]]) -> page.Figure:
    """The paper's Fig. 4: the pieces of each model in a row, all on one scale."""
    rolls = {
        name: [plots.Roll(piece.notes, piece.prime_end_s, piece.name) for piece in pieces]
        for name, pieces in rows.items()
    }
    alt = f"Piano rolls of {sum(map(len, rolls.values()))} continuations, a row for each of: {', '.join(rolls)}."
    return page.Figure(plots.roll_grid(rolls), alt=alt, caption="All on one scale, as Fig. 4 of the paper.")


def music(pieces: Sequence[Piece], sample_rate: int) -> tuple[page.Block, ...]:
    """A piano roll and a player for each piece."""
    blocks = []
    for piece in pieces:
        ground = "" if piece.prime_end_s is None else f"; given up to second {piece.prime_end_s:.1f}, then generated"
        roll = plots.piano_roll(piece.notes, prime_end_s=piece.prime_end_s, title=piece.name)
        blocks.append(page.Figure(roll, alt=f"Piano roll of the {piece.name}, {len(piece.notes)} notes{ground}."))
        blocks.append(page.Audio(piece.name, piece.waveform, sample_rate))
    return tuple(blocks)


def attention_figure(
    model: MusicTransformer,
    params: Any,
    piece: Piece,
    query: int,
    places: Sequence[tuple[float, float] | None],
) -> page.Figure:
    """The paper's Figs. 8 and 9: where the last layer's heads look when a note of a piece is predicted.

    Args:
      model, params: with global relative attention.
      piece: whose notes lie under the lines.
      query: which of its tokens is the note.
      places: where each of its tokens lies, (seconds, pitch), None for one without a pitch.
    """
    # Only the forms that store the weights can show them; they compute the same function as the blockwise one.
    transformer = dataclasses.replace(model.config.transformer, relative_form="skew")
    dense = MusicTransformer(dataclasses.replace(model.config, transformer=transformer))
    inputs = jnp.asarray(token_window(piece.tokens[: query + 1], query + 1)["inputs"])[None]
    _, seen = jax.jit(lambda params: dense.apply({"params": params}, inputs, mutable=["attention_weights"]))(params)
    weights = jax.tree.leaves(seen["attention_weights"]["transformer"]["layers"])[0]  # L B N T S
    weights = np.asarray(weights[-1, 0, : len(plots.COLOURS), query])
    query_s = places[query][0]
    heard = [note for note in piece.notes if note.start_s <= query_s]
    figure = plots.attention_over_piano_roll(
        [note._replace(end_s=min(note.end_s, query_s + MARGIN_S)) for note in heard],
        weights,
        [None, *places[:query]],  # the inputs are shifted: the first is the start
        places[query],
        title=f"Last layer's attention when a note of the {piece.name} is predicted",
    )
    return page.Figure(
        figure,
        alt=f"Piano roll with lines from one predicted note back to the notes that {len(weights)} heads attend to.",
        caption="One line per attended note: colour is the head, width the weight (as in Figs. 8 and 9 of the paper).",
    )
