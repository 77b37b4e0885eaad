"""A Whisper small enough for tests of files: its shape and its tokenizer of single bytes."""

from jaxaudio.data.byte_pair import BytePairEncoding
from jaxaudio.data.whisper_tokenizer import WhisperTokenizer
from jaxaudio.models.whisper import WhisperConfig

BYTES = WhisperTokenizer.for_ranks(BytePairEncoding(tuple(bytes([i]) for i in range(256))), languages=("en", "de"))
# One decoder layer below two encoder layers, as in distilled checkpoints; 5 heads of 16, so that no two axes agree.
SMALL = WhisperConfig(
    vocab_size=BYTES.vocab_size,
    num_mels=8,
    embed_dim=80,
    num_heads=5,
    num_encoder_layers=2,
    num_decoder_layers=1,
    num_frames=40,
    text_length=12,
    alignment_heads=((0, 1), (0, 4)),
)
