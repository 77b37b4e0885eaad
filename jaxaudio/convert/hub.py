"""Checkpoints on the HuggingFace Hub, fetched into its local cache."""

import pathlib
from collections.abc import Sequence

from jaxaudio.convert.tensors import ConvertError


def fetch_folder(repository: str, files: Sequence[str], fallback: Sequence[str] = ()) -> pathlib.Path:
    """The local folder with a repository's files, which are downloaded unless the cache has them.

    The environment variables of huggingface_hub hold: with HF_HUB_OFFLINE=1 only the cache is looked at.

    Args:
      repository: "organisation/name".
      files: names or patterns of the files wanted; those that the repository lacks are left out.
      fallback: wanted too where no .safetensors came.
    Raises:
      ConvertError: huggingface_hub is absent, or the files can be had neither from the Hub nor from the cache.
    """
    advice = f"or download {repository} elsewhere and give the path of its folder"
    try:
        import huggingface_hub
    except ImportError as error:
        raise ConvertError(
            f"{repository!r} is no local path, and to look on the HuggingFace Hub needs `pip install huggingface_hub`; "
            f"install it, {advice}"
        ) from error
    try:
        folder = pathlib.Path(huggingface_hub.snapshot_download(repository, allow_patterns=list(files)))
        if fallback and not any(folder.glob("*.safetensors")):
            folder = pathlib.Path(huggingface_hub.snapshot_download(repository, allow_patterns=[*files, *fallback]))
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ConvertError(
            f"{repository!r} is no local path, and was not found on the HuggingFace Hub or in its cache "
            f"({type(error).__name__}: {reason}); check the name, the network and HF_HUB_OFFLINE, {advice}"
        ) from error
    return folder
