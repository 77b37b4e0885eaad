"""The subcommand `music`: piano music that continues a performance, accompanies a melody, or comes from nothing."""

import argparse
import math
import pathlib
import sys
from typing import TYPE_CHECKING, Any

from jaxaudio.cli.device import CACHE, DEVICES, compilation_cache, use_device

if TYPE_CHECKING:
    import numpy as np

    from jaxaudio.convert.music import MusicModel
    from jaxaudio.data.events import NoteArray
    from jaxaudio.generate.music import Music

SUFFIXES = (".mid", ".midi", ".wav")
MODELS = {"piano": "~/.cache/jaxaudio/music/piano", "accompaniment": "~/.cache/jaxaudio/music/accompaniment"}
_BATCH = 8  # pieces that are written at a time; changes none of them
_SAMPLE_RATE = 44100


def add_parser(commands: Any) -> None:
    """Adds the subcommand to those of argparse's `add_subparsers`."""
    music = commands.add_parser(
        "music",
        help="write piano music with a Music Transformer",
        description="Writes piano music as MIDI or as sound. The same seed, model and options give the same music.",
    )
    kinds = music.add_subparsers(dest="kind", required=True, metavar="KIND")

    proceed = kinds.add_parser(
        "continue",
        help="continue a performance",
        description="Writes the performance in PRIME, its sustain pedal as longer notes, and what the model makes "
        "follow. PRIME may have as many events as the model sees at once; the music may be longer.",
    )
    proceed.add_argument("prime", metavar="PRIME", help="MIDI file of a keyboard performance")
    proceed.add_argument("--prime_seconds", type=float, metavar="S", help="use the first S seconds of PRIME only")
    _add_common(proceed, "piano", "seconds of music after PRIME (default: 20)")

    accompany = kinds.add_parser(
        "accompany",
        help="play a melody with an accompaniment",
        description="Writes a performance of the melody in MELODY with an accompaniment. Of a file with several notes "
        "at once the most probable melody is taken.",
    )
    accompany.add_argument("melody", metavar="MELODY", help="MIDI file")
    _add_common(accompany, "accompaniment", "seconds of music (default: as long as MELODY)")

    sample = kinds.add_parser("sample", help="write music from nothing", description="Writes music from nothing.")
    _add_common(sample, "piano", "seconds of music (default: 30)")
    for parser, seconds in ((proceed, 20.0), (accompany, None), (sample, 30.0)):
        parser.set_defaults(run=_run, on_cpu=False, seconds=seconds)


def _add_common(parser: argparse.ArgumentParser, model: str, seconds: str) -> None:
    add = parser.add_argument
    add("-o", "--out", required=True, metavar="OUT", help=f"file to write, which ends in {', '.join(SUFFIXES)}")
    add("--seconds", type=float, metavar="S", help=seconds)
    add("--seed", type=int, default=0, metavar="N", help="another seed gives other music (default: 0)")
    add("--count", type=int, default=1, metavar="N", help="write OUT-1 to OUT-N with pieces of their own (default: 1)")
    add("--model", default=MODELS[model], metavar="DIR", help=f"folder of the model (default: {MODELS[model]})")
    add("--temperature", type=float, default=1.0, help="below 1 more predictable, 0 always the likeliest (default: 1)")
    add("--top_k", type=int, default=0, metavar="K", help="draw from the K likeliest events (default: 0, all)")
    add("--top_p", type=float, default=1.0, metavar="P", help="draw from the likeliest events of joint probability P")
    add("--overwrite", action="store_true", help="replace files that exist, which otherwise is an error")
    add("--device", choices=DEVICES, help="where to compute (default: the accelerator if there is one)")
    add(
        "--compilation_cache",
        type=lambda text: None if text == "None" else text,
        default=CACHE,
        metavar="DIR",
        help=f"keeps compiled programs for the next run (default: {CACHE}); None keeps none",
    )


def _run(arguments: argparse.Namespace) -> int:
    import jax
    import tqdm

    from jaxaudio.generate.music import accompany, continue_performance
    from jaxaudio.ops.sampling import make_sampling

    outs = _outs(arguments)
    make_sampling(1, temperature=arguments.temperature, top_k=arguments.top_k, top_p=arguments.top_p)
    if arguments.seconds is not None and not 0 < arguments.seconds < math.inf:
        raise ValueError(f"--seconds {arguments.seconds}: expected more than 0 s")
    source = {"continue": "prime", "accompany": "melody"}.get(arguments.kind)
    notes = None if source is None else _read_notes(getattr(arguments, source))
    use_device(arguments.device)
    model = _read_model(arguments)
    if arguments.kind == "accompany":
        given, seconds = _melody(arguments, notes)
        write, seconds = accompany, arguments.seconds or seconds
    else:
        given, write, seconds = _prime(arguments, notes, model), continue_performance, arguments.seconds
    batch = min(arguments.count, _BATCH)
    failed = 0
    form = "{percentage:3.0f}%|{bar}| {n:.0f} of {total:.0f} s of music [{elapsed}<{remaining}]"
    with (
        compilation_cache(arguments.compilation_cache),
        tqdm.tqdm(total=seconds * -(-len(outs) // batch), disable=None, bar_format=form, file=sys.stderr) as bar,
    ):
        for start in range(0, len(outs), batch):
            done = bar.n
            pieces = write(
                model.model,
                model.params,
                model.vocabulary,
                [given] * batch,
                jax.random.key(arguments.seed),
                context=model.context,
                seconds=seconds,
                requests=range(start, start + batch),
                sampling=make_sampling(
                    batch, temperature=arguments.temperature, top_k=arguments.top_k, top_p=arguments.top_p
                ),
                on_progress=lambda new, done=done: bar.update(done + min(new, seconds) - bar.n),
            )
            for out, music in zip(outs[start : start + batch], pieces, strict=False):  # a last batch is filled up
                failed += not _write(out, music, model)
    return 1 if failed else 0


def _outs(arguments: argparse.Namespace) -> list[pathlib.Path]:
    """The files to write."""
    out, count = pathlib.Path(arguments.out), arguments.count
    if out.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{out}: expected a name that ends in {', '.join(SUFFIXES)}")
    if count < 1:
        raise ValueError(f"--count {count}: expected at least 1")
    outs = [out] if count == 1 else [out.with_stem(f"{out.stem}-{number}") for number in range(1, count + 1)]
    for path in outs:
        if path.exists() and not arguments.overwrite:
            raise ValueError(f"{path} exists; choose another name, or add --overwrite")
    return outs


def _read_notes(path: str) -> "NoteArray":
    """The notes of a file, lengthened by the pedal."""
    from jaxaudio.data.events import apply_sustain
    from jaxaudio.data.midi_performance import read_performance

    performance = read_performance(path)
    if performance.num_dropped:
        _say(f"{path}: {performance.num_dropped} notes that never end, or have no length, are left out")
    return apply_sustain(performance)


def _read_model(arguments: argparse.Namespace) -> "MusicModel":
    from jaxaudio.convert.music import read_music_model
    from jaxaudio.models.music_transformer import AccompanimentTransformer

    folder = pathlib.Path(arguments.model).expanduser()
    if not folder.is_dir():
        raise ValueError(
            f"there is no model in {folder}; train one with experiments/music_transformer_piano.py or "
            "experiments/music_transformer_accompaniment.py, and give its folder with --model"
        )
    model = read_music_model(folder)
    accompanies = isinstance(model.model, AccompanimentTransformer)
    if accompanies != (arguments.kind == "accompany"):
        kind = "accompanies melodies" if accompanies else "accompanies no melodies"
        raise ValueError(f"{folder} holds a model that {kind}; `music {arguments.kind}` needs another one")
    return model


def _in_range(notes: "NoteArray", vocabulary: Any, path: str) -> "NoteArray":
    """The notes whose pitches the model knows."""
    low, high = vocabulary.min_pitch, vocabulary.max_pitch
    known = (notes.pitch >= low) & (notes.pitch <= high)
    if not known.any():
        raise ValueError(f"{path}: none of its {len(notes)} notes has a pitch that the model knows, {low} to {high}")
    if not known.all():
        _say(f"{path}: left out {(~known).sum()} of {len(notes)} notes, outside the model's pitches {low} to {high}")
    return notes[known]


def _prime(arguments: argparse.Namespace, notes: "NoteArray | None", model: "MusicModel") -> "np.ndarray":
    """The events to continue; none for a sample."""
    import numpy as np

    from jaxaudio.data.events import encode_events
    from jaxaudio.generate.music import first_seconds, seconds_that_fit

    if notes is None:
        return np.zeros(0, np.int32)
    path, limit_s, vocabulary, context = arguments.prime, arguments.prime_seconds, model.vocabulary, model.context
    tokens = encode_events(_in_range(notes, vocabulary, path), vocabulary)
    if limit_s is not None:
        tokens = first_seconds(tokens, vocabulary, limit_s)
        if not np.isin(tokens, vocabulary.note_on).any():
            raise ValueError(f"--prime_seconds {limit_s}: the first note of {path} begins at {notes.start_s[0]:.2f} s")
    if len(tokens) > context:
        fit = seconds_that_fit(tokens, vocabulary, context)
        raise ValueError(
            f"{path} has {len(tokens)} events, and the model sees {context} at once; its first {fit:.2f} s would fit: "
            f"--prime_seconds {fit:.2f}"
        )
    return tokens


def _melody(arguments: argparse.Namespace, notes: "NoteArray") -> tuple["np.ndarray", float]:
    """The melody's tokens and its length in seconds."""
    from jaxaudio.data.melody import MELODY, encode_melody, infer_melody

    melody = infer_melody(_in_range(notes, MELODY, arguments.melody))
    seconds = float(melody.end_s.max())
    return encode_melody(melody, seconds), seconds


def _write(out: pathlib.Path, music: "Music", model: "MusicModel") -> bool:
    """Writes a piece; returns whether it is as long as it was to be."""
    from jaxaudio.data.events import decode_events
    from jaxaudio.data.midi import write_midi
    from jaxaudio.data.synthesis import synthesize, write_wav
    from jaxaudio.generate.music import MAX_EVENTS_PER_SECOND

    notes = decode_events(music.tokens, model.vocabulary)
    if not notes:
        _say(f"{out}: not written, for the {music.seconds:.2f} s have no note; try another --seed")
        return False
    if out.suffix.lower() == ".wav":
        write_wav(out, synthesize(notes, _SAMPLE_RATE), _SAMPLE_RATE)
    else:
        write_midi(notes, out)
    line = f"{out}: {len(notes)} notes; {music.seconds:.2f} s and {music.num_new} events are new"
    _print(line + ("; the model ended the piece there" if music.ended == "end" else ""))
    if music.ended == "tokens":
        _say(f"{out}: stopped after {music.num_new} events, {MAX_EVENTS_PER_SECOND} for each second asked for")
    return music.ended != "tokens"


def _print(line: str) -> None:
    import tqdm

    tqdm.tqdm.write(line, file=sys.stdout)


def _say(line: str) -> None:
    import tqdm

    tqdm.tqdm.write(f"jaxaudio music: {line}", file=sys.stderr)
