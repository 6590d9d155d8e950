"""What is measured already: one JSON file for each measurement, named by all that it depends on."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paca_lightning.adapters.history import step_name
from paca_lightning.core.checksums import settings_checksum
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.files import replacing
from paca_lightning.core.reading import read_json_file


class Store:
    """Keeps measurements, so that a command that was stopped, or asks for more, repeats none.

    A key is all that a result depends on: the adapter's and the rows' checksums, the model, the settings. So nothing is
    ever stale, and one directory serves several settings.

    Args:
        directory: Need not exist.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def get(self, step: int, key: Mapping[str, Any]) -> Any:
        """A result; None if it is not there.

        Raises:
            PaCAError: If its file is damaged.
        """
        path = self._path(step, key)
        try:
            return read_json_file(path)["result"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PaCAError(f"{path} is damaged ({error}). Remove it: it is measured again.") from error

    def put(self, step: int, key: Mapping[str, Any], result: Any) -> None:
        """Keep a result that JSON can hold."""
        with replacing(self._path(step, key)) as temporary:
            temporary.write_text(json.dumps({"key": key, "result": result}, allow_nan=False) + "\n", encoding="utf-8")

    def _path(self, step: int, key: Mapping[str, Any]) -> Path:
        return self.directory / step_name(step) / f"{settings_checksum(key)}.json"
