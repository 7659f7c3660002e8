"""Files of the Hugging Face Hub, fetched by its own library into its own cache.

https://huggingface.co/docs/huggingface_hub/guides/download; `hf auth login` for what needs a login.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from smollm import ranks
from smollm.errors import InputError, first_line

PREFIX = "hf://"  # says for certain that a word is an id
COMMIT = re.compile(r"[0-9a-f]{40}")
_ID = re.compile(r"[A-Za-z0-9_-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_CHECKPOINT = re.compile(r".*/(latest|best|step_\d+)")


def repository(word: str) -> str | None:
    """The id owner/name of a repository that a word names; None for a path.

    It is a path where a directory `owner` is here, or where it is named as a checkpoint is: a
    misspelt path is not looked for in the network. hf://owner/name is always an id.
    """
    name = word.removeprefix(PREFIX)
    if not _ID.fullmatch(name):
        return None
    is_path = Path(word).parent.exists() or _CHECKPOINT.fullmatch(word)
    return None if is_path and name == word else name


def fetch(repository: str, patterns: Sequence[str]) -> Path:
    """The directory that holds a repository's files of these patterns, fetched unless it is there.

    Without a network what was fetched before serves.

    Raises:
        InputError: they cannot be fetched.
    """
    import huggingface_hub  # takes half a second
    from huggingface_hub import errors

    if not ranks.is_main():  # one progress bar for all
        huggingface_hub.utils.disable_progress_bars()
    only = {"allow_patterns": list(patterns), "ignore_patterns": ["*/*"]}  # no folders
    try:
        return Path(huggingface_hub.snapshot_download(repository, **only))
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
