"""Models by their Hugging Face id: found in the local cache, or downloaded; weights as safetensors only."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from lilliput.errors import SourceError
from lilliput.source.shards import pickles, refuse_pickles

PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "LICENSE*", "README.md"]
CODE = ["*.py"]


def snapshot(model: str, trust_remote_code: bool) -> Path:
    """Local folder of a hub id. Raises SourceError: no such folder or id, no network and not in the cache, pickles."""
    patterns = PATTERNS + (CODE if trust_remote_code else [])
    try:
        folder = Path(snapshot_download(model, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except HFValidationError as error:
        raise SourceError(
            f"'{model}' is neither an existing folder, nor a .gguf file, nor an id such as 'org/name' on the hub."
        ) from error
    except LocalEntryNotFoundError as error:
        raise SourceError(
            f"There is no folder '{model}', and as a hub id it is not in the local cache and the hub cannot be "
            f"reached. Check the path, or run `hf download {model}` where there is a network and give the folder here."
        ) from error
    except HfHubHTTPError as error:
        raise SourceError(
            f"There is no folder '{model}', and the hub refused the id: {str(error).strip().splitlines()[0]}. Check "
            f"the spelling; for a gated or private model, log in with `hf auth login` and accept its terms on its page."
        ) from error
    except OSError as error:
        raise SourceError(
            f"'{model}' could not be downloaded: {error}. Check the disk's free space and the network, and run it "
            "again: what is there already is kept."
        ) from error
    if not any(folder.glob("*.safetensors")):
        names = pickles(folder) or _remote_pickles(model)
        if names:
            raise refuse_pickles(names, folder)
        raise SourceError(
            f"The hub model '{model}' has no safetensors files, so there are no weights that can be read."
        )
    return folder


def _remote_pickles(model: str) -> list[str]:
    try:
        return [x for x in HfApi().list_repo_files(model) if x.endswith((".bin", ".pt", ".pth"))]
    except (HfHubHTTPError, OSError):
        return []
