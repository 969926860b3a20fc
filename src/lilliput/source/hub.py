"""Models by their Hugging Face id: found in the local cache, or downloaded; weights as safetensors only."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from lilliput.errors import SourceError
from lilliput.source.shards import INDEX, WHOLE, named_in, pickles, refuse_pickles
from lilliput.units import few

PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "LICENSE*", "NOTICE*", "README.md"]
TEMPLATES = ["additional_chat_templates/*.jinja"]  # the only files of a subfolder that are of use
CODE = ["*.py"]


def snapshot(model: str, trust_remote_code: bool) -> Path:
    """Local folder of a hub id. Raises SourceError: no such folder or id, no network and not in the cache, pickles."""
    patterns = PATTERNS + (CODE if trust_remote_code else [])
    try:
        folder = Path(snapshot_download(model, allow_patterns=patterns, ignore_patterns=["*/*"]))
        snapshot_download(model, allow_patterns=TEMPLATES)
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
            f"'{model}' could not be downloaded: {error}. Check the disk's free space and the network, and run "
            "it again: what was downloaded is kept."
        ) from error
    _complete(model, folder)
    return folder


def _complete(model: str, folder: Path) -> None:
    """Raises SourceError unless the folder has a config and weights that are no pickles."""
    shards: set[str] = set()
    if not (folder / WHOLE).is_file() and (folder / INDEX).is_file():
        shards = {x.name for x in named_in(folder / INDEX).values()}
    lacking = sorted(x for x in shards if not (folder / x).is_file())
    if not (folder / "config.json").is_file():
        lacking.insert(0, "config.json")
    weights = any(folder.glob("*.safetensors"))
    if weights and not lacking:
        return
    remote = _remote(model)
    names = pickles(folder) or [x for x in remote or () if x.endswith((".bin", ".pt", ".pth"))]
    if names and not weights and not shards:
        raise refuse_pickles(names, folder)
    if remote is None:
        what = few(lacking) if lacking else "its weights"
        raise SourceError(
            f"The local cache holds the hub model '{model}' only in part: it lacks {what}, and the hub cannot be "
            f"reached. Run `hf download {model}` where there is a network, and give the folder here."
        )
    if not weights:
        raise SourceError(
            f"The hub model '{model}' has no safetensors files, so there are no weights that can be read."
        )


def _remote(model: str) -> list[str] | None:
    """Names of the files on the hub; None where it cannot be asked."""
    try:
        return list(HfApi().list_repo_files(model))
    except (HfHubHTTPError, OSError):
        return None
