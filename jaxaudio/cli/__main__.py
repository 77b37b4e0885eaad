"""`python -m jaxaudio.cli` is the `jaxaudio` command."""

import sys

from jaxaudio.cli import main

sys.exit(main())
