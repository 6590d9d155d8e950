"""The note in an output directory of what is compared there."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paca_lightning.core.errors import PaCAError
from paca_lightning.core.files import check_writable, replacing
from paca_lightning.tools.compare.runs import Plan
from paca_lightning.tools.compare.task import Task

PLAN = "comparison.json"


def claim(directory: Path, tasks: Sequence[Task], plan: Plan) -> None:
    """Note in the output directory what is compared, or check that it is what an earlier command compared there.

    Methods, seeds, trials and tasks may be added later; what makes results comparable may not change.

    Raises:
        PaCAError: If the directory cannot be written, or holds another comparison.
    """
    check_writable(directory, "--output")
    path = directory / PLAN
    wanted: dict[str, Any] = {"metric": plan.metric, "steps": plan.steps, "search_steps": plan.search_steps}
    digests = {
        task.name: hashlib.sha256(json.dumps(task.settings, sort_keys=True).encode()).hexdigest()[:16] for task in tasks
    }
    before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known = before.get("tasks", {})
    changed = [name for name, value in wanted.items() if before and before[name] != value]
    changed += [f"the config {name}" for name, digest in digests.items() if known.get(name, digest) != digest]
    if changed:
        raise PaCAError(
            f"--output {str(directory)!r} holds another comparison: it differs in {', '.join(changed)}. Give another "
            "directory, or the command of that one to go on with it."
        )
    if not before and directory.is_dir() and any(directory.iterdir()):
        raise PaCAError(f"--output {str(directory)!r} holds other files, and no comparison. Give another directory.")
    directory.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(wanted | {"tasks": known | digests}, indent=1) + "\n", encoding="utf-8")
