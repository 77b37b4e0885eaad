"""What `jaxaudio transcribe` is told: openai-whisper's options by their names, and what is ours beside them."""

import argparse
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jaxaudio.cli.device import CACHE, DEVICES
from jaxaudio.data.languages import language_code

if TYPE_CHECKING:
    from jaxaudio.generate.transcribe_options import TranscribeOptions

MAX_BATCH = 8
SUBTITLE_OPTIONS = ("highlight_words", "max_line_width", "max_line_count", "max_words_per_line")
_BEST_OF, _BEAM_SIZE = 5, 5


def add_parser(commands: Any) -> None:
    """Adds the subcommand to those of argparse's `add_subparsers`."""
    parser = commands.add_parser(
        "transcribe",
        help="speech to text with Whisper",
        description="Transcribes audio files with Whisper. Options have the names, values and defaults of "
        "openai-whisper's command, but for the four about the machine (--device, --fp16, --threads, --model_dir), and "
        "files are byte for byte what it writes. Windows of all files share batches, which does not change what is "
        "heard in any of them. A file that cannot be transcribed is reported in one line and the others go on; the "
        "exit status is 1 then. A run with --manifest can be killed and started again with the same command: it goes "
        "on where it was.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "audio", nargs="*", metavar="FILE", help="audio files: wav, flac, ogg, mp3; with PyAV m4a, mp4, webm"
    )
    _add_their_options(parser)
    _add_decoding_options(parser)
    _add_our_options(parser.add_argument_group("options of jaxaudio alone"))
    parser.set_defaults(run=_run, on_cpu=False, usage_error=parser.error)


def transcribe_options(arguments: argparse.Namespace, num_files: int) -> "TranscribeOptions":
    """The options of a parsed command line for so many files.

    Raises:
      ValueError: values that are out of range or contradict each other; see `TranscribeOptions`.
    """
    from jaxaudio.data.voice_activity import EnergyDetector, SileroDetector
    from jaxaudio.generate.transcribe_options import TranscribeOptions

    names = {field.name for field in dataclasses.fields(TranscribeOptions)}
    options = {name: value for name, value in vars(arguments).items() if name in names}
    temperatures = _temperatures(arguments.temperature, arguments.temperature_increment_on_fallback)
    # As in openai-whisper, the defaults hold where they can act; other values that cannot are errors.
    if min(temperatures) > 0 and options["beam_size"] == _BEAM_SIZE:
        options["beam_size"] = None
    if max(temperatures) == 0 and options["best_of"] == _BEST_OF:
        options["best_of"] = None
    if arguments.batch_size is None:
        options["batch_size"] = MAX_BATCH if arguments.batched else max(1, min(num_files, MAX_BATCH))
    if arguments.vad is not None:
        options["vad"] = EnergyDetector() if arguments.vad == "energy" else SileroDetector(arguments.vad)
    return TranscribeOptions(**options | {"temperature": temperatures})


def _temperatures(first: float, increment: float | None) -> tuple[float, ...]:
    """The temperatures to try, one after the other, with the rounding of openai-whisper."""
    import numpy as np

    if increment is None:
        return (first,)
    if not increment > 0 or not 0 <= first <= 1:
        raise ValueError(
            f"--temperature {first} rises by --temperature_increment_on_fallback {increment} up to 1: expected a "
            "temperature from 0 to 1 and an increment above 0; with the increment None it does not rise"
        )
    return tuple(np.arange(first, 1.0 + 1e-6, increment).tolist())


def _run(arguments: argparse.Namespace) -> int:
    from jaxaudio.cli.transcribe import run

    return run(arguments)


def _add_their_options(parser: argparse.ArgumentParser) -> None:
    add, switch, words = parser.add_argument, _switch(), "(requires --word_timestamps True)"
    add("--model", default="turbo", help="folder (HuggingFace's or ours), .pt file, HuggingFace Hub id, or size")
    model_dir = "models lie in the cache of huggingface_hub, which the environment variable HF_HUB_CACHE moves"
    add("--model_dir", type=_refused("None", model_dir), metavar="None", help=f"cannot be changed: {model_dir}")
    chosen = "None is the accelerator if there is one; CUDA_VISIBLE_DEVICES chooses among several"
    add("--device", choices=DEVICES, help=f"where to compute; {chosen}")
    add("--output_dir", "-o", default=".", help="folder of the outputs, made if it is missing")
    formats = "None is all, or with --manifest no files beside its lines. Existing files are replaced"
    choices = ("txt", "vtt", "srt", "tsv", "json", "all")
    add("--output_format", "-f", choices=choices, help=f"format of the files; {formats}")
    add("--verbose", **switch, default=True, help="print what was heard, what was skipped and what took how long")
    add("--highlight_words", **switch, default=False, help=f"{words} underline each word as it is spoken (srt, vtt)")
    add("--max_line_width", type=_optional(int), help=f"{words} characters of a line (srt, vtt)")
    add("--max_line_count", type=_optional(int), help=f"{words} lines of a subtitle; needs --max_line_width")
    add("--max_words_per_line", type=_optional(int), help=f"{words} words of a subtitle (srt, vtt)")
    fp16 = "computation in 16 bits is --dtype bfloat16"
    add("--fp16", type=_refused("False", fp16), default="False", metavar="False", help=f"cannot be True: {fp16}")
    threads = "XLA takes all CPUs that the process may use; start it with taskset to give it fewer"
    add("--threads", type=_refused("0", threads), default="0", metavar="0", help=f"cannot be changed: {threads}")


def _add_decoding_options(parser: argparse.ArgumentParser) -> None:
    add, switch, words = parser.add_argument, _switch(), "(requires --word_timestamps True)"
    tasks = ("transcribe", "translate")
    add("--task", default="transcribe", choices=tasks, help="text in the language spoken, or in English")
    add("--language", type=_language, help="spoken in the audio, a code or an English name; None detects it")
    add("--temperature", type=float, default=0.0, help="of sampling; 0 takes the most likely text")
    add("--best_of", type=_optional(int), default=_BEST_OF, help="samples to choose from at temperatures above 0")
    add("--beam_size", type=_optional(int), default=_BEAM_SIZE, help="beams of the search at temperature 0")
    add("--patience", type=_optional(float), help="waits for patience * beam_size finished beams; None is 1")
    ranking = "alpha of ranking by length, 0 to 1; None ranks by mean log-probability"
    add("--length_penalty", type=_optional(float), help=ranking)
    symbols = "ids never said; -1 stands for symbols that nobody pronounces"
    add("--suppress_tokens", type=_ids, default="-1", metavar="ID,ID,...", help=symbols)
    add("--initial_prompt", help="text before the first window, as an example of names and style")
    add("--carry_initial_prompt", **switch, default=False, help="put --initial_prompt before every window")
    condition = "the text so far prompts the next window; None is True, but False with --batched"
    add("--condition_on_previous_text", **switch, help=condition)
    increment = "added to the temperature, up to 1, while a window fails one of the next two; None tries once"
    add("--temperature_increment_on_fallback", type=_optional(float), default=0.2, help=increment)
    shrunk = "a text that zlib shrinks by more has failed"
    add("--compression_ratio_threshold", type=_optional(float), default=2.4, help=shrunk)
    add("--logprob_threshold", type=_optional(float), default=-1.0, help="a lower mean log-probability has failed")
    silent = "a window with a higher probability of no speech, and below --logprob_threshold, is skipped"
    add("--no_speech_threshold", type=_optional(float), default=0.6, help=silent)
    add("--word_timestamps", **switch, default=False, help="times of words, from cross-attention")
    add("--prepend_punctuations", default="\"'“¿([{-", help=f"{words} marks that belong to the next word")
    add("--append_punctuations", default="\"'.。,，!！?？:：”)]}、", help=f"{words} and to the previous one")
    clips = "start,end,start,... in seconds of what to transcribe"
    add("--clip_timestamps", default="0", metavar="S,S,...", help=f"{clips}; the last end may be left out")
    invented = f"{words} skip silence longer than this, in seconds, around words that look invented"
    add("--hallucination_silence_threshold", type=_optional(float), help=invented)


def _add_our_options(parser: Any) -> None:
    add, switch = parser.add_argument, _switch()
    add("--batched", **switch, default=False, help="find speech first and transcribe its clips at the same time")
    batch_size = f"the number of files, {MAX_BATCH} at most; {MAX_BATCH} with --batched. Results do not depend on it"
    add("--batch_size", type=int, help=f"windows per call of the model; None is {batch_size}")
    vad = "levels, or Silero's model, which needs onnxruntime; None is energy with --batched, else all is transcribed"
    add("--vad", metavar="energy|FILE.onnx", help=f"transcribe only what this takes for speech: {vad}")
    add("--hotwords", help="words to expect, said before every window")
    add("--repetition_penalty", type=float, default=1.0, help="above 1, tokens said before become less likely")
    add("--no_repeat_ngram_size", type=int, default=0, help="no sequence of so many tokens comes twice; 0 allows it")
    add("--tokenizer", help="its file or folder, in place of the model's own; .pt files have none")
    int8 = "decoder's weights in 8 bits, a slightly different model; a CPU expands them at each call and gains nothing"
    add("--int8", **switch, default=False, help=int8)
    add("--dtype", choices=("float32", "bfloat16"), help="of the computation; None is the model's own")
    add("--seed", type=int, default=0, help="of sampling above temperature 0")
    manifest = "instead of files, a list of them, one JSON object per line: audio, and perhaps language, duration_s, id"
    add("--manifest", metavar="LIST.jsonl", help=f"{manifest}. Results go to LIST.I-of-N.jsonl in --output_dir")
    add("--process_index", type=int, help="of a --manifest: which share of it is this process's, from 0")
    add("--process_count", type=int, help="of a --manifest: how many processes share it")
    cache = "keeps compiled programs for the next run, unless JAX_COMPILATION_CACHE_DIR names another; None keeps none"
    add("--compilation_cache", type=_optional(str), default=CACHE, metavar="DIR", help=cache)


def _switch() -> dict[str, Any]:
    return {"type": _on_off, "nargs": "?", "const": True, "metavar": "True|False"}


def _on_off(text: str) -> bool:
    if text not in ("True", "False"):
        raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}; put files first, or give True")
    return text == "True"


def _optional(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        return None if text == "None" else kind(text)

    parse.__name__ = f"{kind.__name__} or None"  # argparse's word for it
    return parse


def _refused(harmless: str, reason: str) -> Callable[[str], Any]:
    def parse(text: str) -> str:
        if text != harmless:
            raise argparse.ArgumentTypeError(f"{text!r} cannot act here: {reason}")
        return text

    return parse


def _ids(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(",")) if text else ()
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected ids with commas between them, got {text!r}") from error


def _language(text: str) -> str | None:
    try:
        return None if text == "None" else language_code(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
