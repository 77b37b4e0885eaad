"""jaxaudio: the JAX library of audio understanding and synthesis systems."""

__version__ = "0.1.0"
