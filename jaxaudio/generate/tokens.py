"""Lists of recordings as token datasets: decoded, encoded in batches, written shard by shard."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxaudio.data.audio import AudioError, audio_info, read_blocks
from jaxaudio.data.manifests import Utterance, shard
from jaxaudio.data.token_dataset import FailedClip, TokenClip, TokenFormat, TokenWriter
from jaxaudio.generate.codec import Codec, Encoded
from jaxaudio.generate.compression import file_header

CLIPS_PER_SHARD = 1000


def token_format(codec: Codec, num_codebooks: int) -> TokenFormat:
    """What the codes of a codec mean, as a token dataset says it."""
    config, header = codec.config, file_header(codec, num_codebooks)
    return TokenFormat(
        codec=codec.name,
        config_hash=header.config_hash,
        codebooks_hash=header.codebooks_hash,
        num_codebooks=num_codebooks,
        codebook_size=config.codebook_size,
        frame_rate=float(config.frame_rate),
        hop_length=config.hop_length,
        sample_rate=config.sample_rate,
        channels=config.channels,
        scale=config.segment_length is not None,
        segment_length=config.segment_length,
        segment_stride=None if config.segment_length is None else config.segment_stride,
    )


def tokenize(
    codec: Codec,
    utterances: Sequence[Utterance],
    folder: str | os.PathLike,
    *,
    root: str | os.PathLike,
    num_codebooks: int,
    batch_size: int = 8,
    clips_per_shard: int = CLIPS_PER_SHARD,
    process_index: int = 0,
    process_count: int = 1,
    on_clip: Callable[[TokenClip | FailedClip], None] = lambda clip: None,
) -> dict[str, Any] | None:
    """Encodes a list of recordings into a token dataset, or this process's share of its shards.

    A call that was killed goes on with the shards that it had not finished; one that met recordings that fail does
    those again. Neither batches nor processes change the result.

    Args:
      codec: mono recordings give both channels of a stereo codec, stereo ones are mixed down for a mono codec.
      utterances: the whole list; their paths can be opened.
      folder: of the dataset, see `data.token_dataset`.
      root: of the list; recordings below it are remembered by their paths relative to it.
      num_codebooks: of each frame.
      batch_size: recordings that are encoded together.
      clips_per_shard: recordings of a shard.
      process_index, process_count: every process_count-th shard from the process_index-th on is this process's.
      on_clip: told of each recording when it is encoded or has failed.

    Returns:
      The manifest, or None if shards of other processes are missing.
    Raises:
      ValueError: the folder has codes of another codec, bandwidth, list or size of shards (has both); more codebooks
        than the codec has; or an impossible process.
    """
    if not 1 <= num_codebooks <= codec.config.num_codebooks:
        raise ValueError(f"{num_codebooks} codebooks of {codec.name}, which has 1 to {codec.config.num_codebooks}")
    root = os.path.abspath(root)
    remembered = [dataclasses.replace(item, audio=_relative(item.audio, root)) for item in utterances]
    writer = TokenWriter(folder, token_format(codec, num_codebooks), remembered, clips_per_shard)
    for number in shard(range(writer.num_shards), process_index, process_count):
        todo, results = writer.todo(number), []
        if not todo:
            continue
        for index, encoded in _encode_all(codec, {i: utterances[i].audio for i in todo}, num_codebooks, batch_size):
            if isinstance(encoded, Exception):
                result = FailedClip(index, remembered[index], " ".join(str(encoded).split()))
            else:
                result = TokenClip(index, remembered[index], encoded.codes, encoded.num_samples, encoded.scales)
            results.append(result)
            on_clip(result)
        writer.write(number, results)
    return writer.finish()


def _encode_all(
    codec: Codec, paths: Mapping[int, str], num_codebooks: int, batch_size: int
) -> Iterator[tuple[int, Encoded | Exception]]:
    """Codes of each recording, or why there are none; those of like length together."""
    lengths = {}
    for index, path in paths.items():
        try:
            lengths[index] = audio_info(path).duration_s
        except (AudioError, OSError) as error:
            yield index, error
    order = sorted(lengths, key=lengths.get)
    for start in range(0, len(order), batch_size):
        waveforms = {}
        for index in order[start : start + batch_size]:
            try:
                blocks = read_blocks(paths[index], codec.config.sample_rate, channels=codec.config.channels)
                waveforms[index] = np.concatenate(list(blocks))
            except (AudioError, OSError) as error:
                yield index, error
        yield from _encode(codec, waveforms, num_codebooks)


def _encode(
    codec: Codec, waveforms: Mapping[int, np.ndarray], num_codebooks: int
) -> Iterator[tuple[int, Encoded | Exception]]:
    if not waveforms:
        return
    try:
        encoded: Sequence[Encoded | Exception] = codec.encode_batch(
            list(waveforms.values()), num_codebooks=num_codebooks
        )
    except ValueError as error:
        if len(waveforms) > 1:  # one of them is to blame
            for index, waveform in waveforms.items():
                yield from _encode(codec, {index: waveform}, num_codebooks)
            return
        encoded = [error]
    yield from zip(waveforms, encoded, strict=True)


def _relative(path: str, root: str) -> str:
    path = os.path.abspath(path)
    return os.path.relpath(path, root) if os.path.commonpath([path, root]) == root else path
