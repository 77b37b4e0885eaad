"""openai-whisper, transformers and faster-whisper with one set of random weights, called as each does itself.

Weights are random because no speed depends on what they say, with one care: the embeddings of end-of-text and of all
ids after it (times among them) are a hundredth of the others. Their logits, tied to the embeddings, are then near 0 and
never the highest of 51865. So no text ends early and none has times, in any implementation and without any option: each
suppresses what it does by default and makes exactly the tokens that it is asked for.

faster-whisper is optional (extra `bench`); without it its functions are missing from every dict.
"""

import dataclasses
import functools
import importlib.util
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
import whisper
from transformers.modeling_outputs import BaseModelOutput

from experiments.benchmarks.whisper_limits import PROMPT_LENGTH
from jaxaudio.convert.whisper import convert_whisper, load_whisper
from jaxaudio.data.whisper_tokenizer import WhisperTokenizer
from jaxaudio.models.whisper import Whisper, WhisperConfig

OPENAI, TRANSFORMERS = "openai-whisper", "transformers"
FASTER = {"float32": "faster-whisper float32", "int8": "faster-whisper int8"}
WINDOW_S = 30


@dataclasses.dataclass(frozen=True)
class Peers:
    """One Whisper, four times.

    Attributes:
      config, tokenizer, model, params: ours; float32 arrays, layers stacked.
      openai: openai-whisper's.
      transformers: its model with `scaled_dot_product_attention`.
      faster: faster-whisper's by compute type, "float32" and "int8"; empty if it is not installed.
    """

    config: WhisperConfig
    tokenizer: WhisperTokenizer
    model: Whisper
    params: Any
    openai: whisper.model.Whisper
    transformers: transformers.WhisperForConditionalGeneration
    faster: dict[str, Any]


def has_faster_whisper() -> bool:
    """Whether it is installed."""
    return importlib.util.find_spec("faster_whisper") is not None


def random_openai(config: WhisperConfig, seed: int = 0) -> whisper.model.Whisper:
    """openai-whisper's model with random weights, such that text depends on the audio and does not repeat itself."""
    torch.manual_seed(seed)
    dims = whisper.model.ModelDimensions(
        n_mels=config.num_mels,
        n_audio_ctx=config.num_positions,
        n_audio_state=config.embed_dim,
        n_audio_head=config.num_heads,
        n_audio_layer=config.num_encoder_layers,
        n_vocab=config.vocab_size,
        n_text_ctx=config.text_length,
        n_text_state=config.embed_dim,
        n_text_head=config.num_heads,
        n_text_layer=config.num_decoder_layers,
    )
    model = whisper.model.Whisper(dims).eval()
    first_special = whisper.tokenizer.get_tokenizer(model.is_multilingual).eot
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "decoder.token_embedding.weight":
                parameter.normal_(std=3 * config.embed_dim**-0.5)  # of the logits: 3
                parameter[first_special:] *= 0.01
            elif name == "decoder.positional_embedding":
                parameter.normal_(std=0.5)
            elif parameter.ndim > 1:
                parameter.normal_(std=1.5 * math.prod(parameter.shape[1:]) ** -0.5)
    return model


def make_peers(config: WhisperConfig, folder: pathlib.Path, cores: int) -> Peers:
    """The same random weights in all implementations, by way of files in `folder`, which may be deleted afterwards.

    openai-whisper's .pt -> our converter -> a HuggingFace folder, from which transformers, we and CTranslate2's
    converter load. CTranslate2 makes its 8-bit weights from the float ones when it loads them.
    """
    openai = random_openai(config)
    state = {"dims": dataclasses.asdict(openai.dims), "model_state_dict": openai.state_dict()}
    torch.save(state, folder / "openai.pt")
    ranks = pathlib.Path(whisper.__file__).parent / "assets"
    ranks /= "multilingual.tiktoken" if openai.is_multilingual else "gpt2.tiktoken"
    convert_whisper(folder / "openai.pt", folder / "hf", tokenizer=ranks)
    (folder / "openai.pt").unlink()
    transformers.logging.set_verbosity_error()  # it warns of its own defaults
    transformers.logging.disable_progress_bar()
    checkpoint = load_whisper(folder / "hf")
    theirs = transformers.WhisperForConditionalGeneration.from_pretrained(
        folder / "hf", attn_implementation="sdpa", dtype=torch.float32
    )
    return Peers(
        config=checkpoint.config,
        tokenizer=checkpoint.tokenizer,
        model=Whisper(checkpoint.config),
        params=jax.tree.map(jnp.array, checkpoint.params),
        openai=openai,
        transformers=theirs.eval(),
        faster=_faster(folder, cores) if has_faster_whisper() else {},
    )


def _faster(folder: pathlib.Path, cores: int) -> dict[str, Any]:
    import faster_whisper
    from ctranslate2.converters import TransformersConverter

    companions = ["tokenizer.json", "preprocessor_config.json"]
    converted = TransformersConverter(str(folder / "hf"), copy_files=companions).convert(str(folder / "ctranslate2"))
    return {
        kind: faster_whisper.WhisperModel(str(converted), device="cpu", compute_type=kind, cpu_threads=cores)
        for kind in FASTER
    }


def log_mels(num_mels: int) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """By name: samples (1, A) of one window -> log-mel (1, T, M)."""
    extract = transformers.WhisperFeatureExtractor(feature_size=num_mels)
    calls = {
        OPENAI: lambda audio: whisper.log_mel_spectrogram(audio[0], num_mels).numpy().T[None],
        TRANSFORMERS: lambda audio: extract(audio[0], sampling_rate=16_000, return_tensors="np").input_features.mT,
    }
    if has_faster_whisper():
        from faster_whisper.feature_extractor import FeatureExtractor

        faster = FeatureExtractor(feature_size=num_mels)
        calls["faster-whisper"] = lambda audio: faster(audio[0], padding=0).T[None]
    return calls


def encoders(peers: Peers) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """By name: log-mel (B, M, T) -> the encoder's output (B, S, D)."""

    @torch.inference_mode()
    def openai(mel):
        return peers.openai.encoder(torch.from_numpy(mel)).numpy()

    @torch.inference_mode()
    def transformers_encoder(mel):
        return peers.transformers.model.encoder(torch.from_numpy(mel)).last_hidden_state.numpy()

    def faster(model, mel):
        return np.asarray(model.encode(mel))

    calls = {OPENAI: openai, TRANSFORMERS: transformers_encoder}
    return calls | {FASTER[kind]: functools.partial(faster, model) for kind, model in peers.faster.items()}


def decoders(peers: Peers, num_tokens: int) -> dict[str, Callable[[np.ndarray], list[list[int]]]]:
    """By name: the encoder's output (B, S, D) -> `num_tokens` tokens of each row, greedily, without timestamps."""
    options = whisper.DecodingOptions(
        language="en", temperature=0.0, sample_len=num_tokens, without_timestamps=True, fp16=False
    )

    @torch.inference_mode()
    def openai(hidden):
        return [list(row.tokens) for row in whisper.decode(peers.openai, torch.from_numpy(hidden), options)]

    @torch.inference_mode()
    def transformers_generate(hidden):
        return peers.transformers.generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=torch.from_numpy(hidden)),
            max_new_tokens=num_tokens,
            language="en",
            task="transcribe",
            num_beams=1,
            do_sample=False,
        ).tolist()

    prompt = [*peers.tokenizer.sot_sequence("en"), peers.tokenizer.no_timestamps]
    longest = _faster_length(num_tokens)

    def faster(model, hidden):
        from ctranslate2 import StorageView

        features = StorageView.from_array(hidden)
        results = model.model.generate(features, [prompt] * len(hidden), beam_size=1, max_length=longest)
        return [list(result.sequences_ids[0]) for result in results]

    calls = {OPENAI: openai, TRANSFORMERS: transformers_generate}
    return calls | {FASTER[kind]: functools.partial(faster, model) for kind, model in peers.faster.items()}


def openai_logits(peers: Peers, hidden: np.ndarray, row: int, tokens: Sequence[int]) -> np.ndarray:
    """openai-whisper's logits (V,) after the prompt and `tokens`, of one row of the encoder's output."""
    prompt = [*peers.tokenizer.sot_sequence("en"), peers.tokenizer.no_timestamps, *tokens]
    with torch.inference_mode():
        return peers.openai.logits(torch.tensor([prompt]), torch.from_numpy(hidden[row : row + 1]))[0, -1].numpy()


def _faster_length(num_tokens: int) -> int:
    """CTranslate2's `max_length`: it samples at most half of it, and never more than it leaves beside the prompt."""
    return max(2 * num_tokens, num_tokens + PROMPT_LENGTH)


def transcribers(peers: Peers, num_tokens: int, batch_size: int) -> dict[str, Callable[[np.ndarray], list[list[int]]]]:
    """By name: samples (A,) of any length -> the tokens of each window of 30 s, none prompted by the one before it.

    openai-whisper's `transcribe` goes window by window. faster-whisper's batched pipeline is given the same windows as
    clips, `batch_size` at once; it normalises each on its own, so that its text may differ.
    """

    def openai(audio):
        result = peers.openai.transcribe(
            audio,
            language="en",
            temperature=0.0,
            sample_len=num_tokens,
            without_timestamps=True,
            condition_on_previous_text=False,
            compression_ratio_threshold=None,
            logprob_threshold=None,
            no_speech_threshold=None,
            fp16=False,
        )
        return [segment["tokens"] for segment in result["segments"]]

    def faster(model, audio):
        from faster_whisper import BatchedInferencePipeline

        clips = [{"start": start, "end": end} for start, end in windows(len(audio))]
        segments, _ = BatchedInferencePipeline(model).transcribe(
            audio,
            language="en",
            temperature=0.0,
            beam_size=1,
            max_new_tokens=_faster_length(num_tokens) - PROMPT_LENGTH,
            batch_size=batch_size,
            clip_timestamps=clips,
        )
        return [segment.tokens for segment in segments]

    calls = {OPENAI: openai}
    return calls | {f"{FASTER[kind]}, batched": functools.partial(faster, x) for kind, x in peers.faster.items()}


def windows(num_samples: int, sample_rate: int = 16_000) -> list[tuple[float, float]]:
    """(start, end) in seconds of the windows of an audio; the last may be shorter."""
    duration_s = num_samples / sample_rate
    return [(float(s), min(float(s + WINDOW_S), duration_s)) for s in range(0, math.ceil(duration_s), WINDOW_S)]
