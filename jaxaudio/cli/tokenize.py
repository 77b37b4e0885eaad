"""The subcommand `tokenize`: a list of recordings as codes for language models."""

import argparse
import os
import sys
from typing import Any

from jaxaudio.cli.device import CACHE, DEVICES, compilation_cache, use_device


def add_parser(commands: Any) -> None:
    """Adds the subcommand to those of argparse's `add_subparsers`."""
    parser = commands.add_parser(
        "tokenize",
        help="encode a list of recordings into a token dataset, which language models read",
        description="Encodes the recordings of MANIFEST into the folder OUT: shards of codes, a line for each of them "
        "with what the list says of it, and manifest.json with what the codes mean. A run that was killed goes on "
        "where it was, shard by shard, when it is given the same command again; another codec, bandwidth or list is "
        "refused then. A recording that cannot be encoded is reported in one line, named in manifest.json, and the "
        "others go on; the exit status is 1, and the same command tries it again.",
    )
    parser.add_argument("manifest", metavar="MANIFEST", help="list of recordings, one JSON object per line")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument(
        "--codec",
        required=True,
        metavar="DIR_OR_ID",
        help="its folder or file, a HuggingFace Hub id, or a published one",
    )
    rate = parser.add_mutually_exclusive_group()
    rate.add_argument("--kbps", type=float, help="bandwidth (default: all codebooks of the codec)")
    rate.add_argument("--num_codebooks", type=int, help="instead of --kbps")
    parser.add_argument("--process_index", type=int, default=0, help="which share of the shards to do (default: 0)")
    parser.add_argument("--process_count", type=int, default=1, help="shares that there are (default: 1)")
    parser.add_argument("--batch_size", type=int, default=8, help="recordings at a time; changes no code (default: 8)")
    parser.add_argument("--clips_per_shard", type=int, default=1000, help="recordings of a shard (default: 1000)")
    parser.add_argument("--device", choices=DEVICES, help="where to compute (default: the accelerator if there is one)")
    parser.add_argument(
        "--compilation_cache",
        type=lambda text: None if text == "None" else text,
        default=CACHE,
        metavar="DIR",
        help=f"keeps compiled programs for the next run (default: {CACHE}); None keeps none",
    )
    parser.set_defaults(run=_run, on_cpu=False)


def _run(arguments: argparse.Namespace) -> int:
    import tqdm

    from jaxaudio.cli.codec import load, num_codebooks_of
    from jaxaudio.data.manifests import read_manifest
    from jaxaudio.data.token_dataset import FailedClip, TokenClip
    from jaxaudio.generate.tokens import tokenize

    use_device(arguments.device)
    utterances = read_manifest(arguments.manifest)
    codec = load(arguments.codec)
    num_codebooks = num_codebooks_of(arguments, codec)
    num_failed, heard_s = 0, 0.0

    def on_clip(clip: TokenClip | FailedClip) -> None:
        nonlocal num_failed, heard_s
        bar.update()
        if isinstance(clip, FailedClip):
            num_failed += 1
            _say(clip.error if clip.utterance.audio in clip.error else f"{clip.utterance.audio}: {clip.error}")
        else:
            heard_s += clip.num_samples / codec.config.sample_rate

    with (
        compilation_cache(arguments.compilation_cache),
        tqdm.tqdm(unit=" recordings", disable=None, file=sys.stderr) as bar,
    ):
        manifest = tokenize(
            codec,
            utterances,
            arguments.out,
            root=os.path.dirname(os.path.abspath(arguments.manifest)),
            num_codebooks=num_codebooks,
            batch_size=arguments.batch_size,
            clips_per_shard=arguments.clips_per_shard,
            process_index=arguments.process_index,
            process_count=arguments.process_count,
            on_clip=on_clip,
        )
    print(f"{arguments.out}: {num_codebooks} codebooks of {codec.name}, {heard_s:.1f} s encoded now")
    if manifest is None:
        print("the shards of other processes are missing; the last process to end writes manifest.json")
    else:
        print(f"{manifest['num_clips']:,} clips, {manifest['num_frames']:,} frames, {len(manifest['failed'])} failed")
    return 1 if num_failed else 0


def _say(line: str) -> None:
    import tqdm

    tqdm.tqdm.write(f"jaxaudio tokenize: {line}", file=sys.stderr)
