"""Files of the Hugging Face Hub, fetched by its own library into its own cache.

https://huggingface.co/docs/huggingface_hub/guides/download; `hf auth login` for what needs a login.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from smollm.errors import InputError, first_line

_ID = re.compile(r"[A-Za-z0-9_-][\w.-]*/[\w-][\w.-]*", re.ASCII)


def is_id(word: str) -> bool:
    """Whether a word may be the id of a repository: owner/name, where no `owner` is here.

    Else it is a path, and a misspelt one is not looked for in the network.
    """
    return _ID.fullmatch(word) is not None and not Path(word).parent.exists()


def fetch(repository: str, patterns: Sequence[str]) -> Path:
    """The directory that holds a repository's files of these patterns, fetched unless it is there.

    Without a network what was fetched before serves.

    Raises:
        InputError: they cannot be fetched.
    """
    import huggingface_hub  # takes half a second
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=list(patterns)))
    except errors.GatedRepoError as error:
        raise InputError(
            f"{repository}: the Hub gives it to users who have accepted its terms only; accept "
            f"them at https://huggingface.co/{repository}, then type: hf auth login"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"{repository}: is neither a path here nor a repository of the Hub that you may read; "
            "mind the spelling, or type: hf auth login"
        ) from error
    except Exception as error:  # the library raises whatever its HTTP client and the disk do
        raise InputError(
            f"{repository}: is no path here, and cannot be fetched from the Hub (no network?); "
            "connect this machine to the network once, or name a directory "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error
