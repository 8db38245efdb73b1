"""A Hugging Face Hub model as a local folder: downloaded once per machine, before workers start.

Owns which files are wanted and what a failed download means for a user. HF_ENDPOINT,
HF_HUB_OFFLINE, HF_HOME and HF_TOKEN are honoured by huggingface_hub itself.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from ragfleet.errors import ConfigError, ModelError

_WANTED: Final = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
_SECOND_LAYOUT: Final = "consolidated*.safetensors"
"""The same weights once more, for other libraries."""
_REPO_ID: Final = re.compile(r"[\w.-]+(/[\w.-]+)?")


def download(model_id: str, trust_remote_code: bool) -> Path:
    """Folder of the model in the local cache; downloads what is missing.

    Raises:
        ModelError: no such model, no access, no connection, with what to set.
    """
    if not _REPO_ID.fullmatch(model_id):
        raise ConfigError(
            f"--model_path {model_id} is no Hub id (like org/name); for a folder use"
            " --inference_type local."
        )
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError:
        raise ConfigError(
            "--inference_type huggingface needs huggingface_hub:"
            " pip install -e '.[local]' in the project's folder."
        ) from None
    wanted = [*_WANTED, "*.py"] if trust_remote_code else _WANTED
    try:
        folder = snapshot_download(
            model_id, allow_patterns=wanted, ignore_patterns=[_SECOND_LAYOUT]
        )
        if not any(Path(folder).glob("*.safetensors")):
            folder = snapshot_download(model_id, allow_patterns=wanted)
        return Path(folder)
    except errors.GatedRepoError:
        raise ModelError(
            f"The Hub model {model_id} is gated: ask for access on its page, then set HF_TOKEN."
        ) from None
    except errors.RepositoryNotFoundError:
        raise ModelError(
            f"There is no Hub model {model_id} (or it is private: set HF_TOKEN)."
        ) from None
    except errors.LocalEntryNotFoundError:
        raise ModelError(
            f"The Hub model {model_id} is not in the local cache and the Hub can't be reached."
            " Set HF_ENDPOINT to a mirror, unset HF_HUB_OFFLINE, or download it elsewhere and use"
            " --inference_type local."
        ) from None
    except (OSError, errors.HfHubHTTPError) as error:
        raise ModelError(
            f"Can't download the Hub model {model_id}: {type(error).__name__}: {error}"
        ) from None
