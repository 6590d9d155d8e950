"""The command ``estimate``: its options, and a run built from its config."""

import argparse
from pathlib import Path

from rich.console import Console

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.pretrained import NOT_LOADED
from paca_lightning.tools.memory.estimate import estimate
from paca_lightning.tools.memory.from_config import read_config, run_to_trace
from paca_lightning.tools.presets import PRESETS
from paca_lightning.tools.short_errors import PlainShortErrors
from paca_lightning.tools.units import parse_bytes


def main(arguments: list[str]) -> int:
    """Run ``paca-lightning estimate``.

    Args:
        arguments: Its own options, and whatever ``fit`` takes.

    Returns:
        The exit code: 1 if the run does not fit the budget, otherwise 0.

    Raises:
        PaCAError: If an argument is outside its range, or the run cannot be traced.
    """
    known, others = _options().parse_known_args(arguments)
    if not others:
        raise PaCAError("There is no run to estimate. Give its config: paca-lightning estimate --config FILE.")
    for name in ("tokens", "batch"):
        if (value := getattr(known, name)) is not None and value < 1:
            raise PaCAError(f"--{name} must be at least 1, not {value}.")
    if known.budget is not None:
        parse_bytes(known.budget)
    if known.json_file and not Path(known.json_file).parent.is_dir():
        raise PaCAError(f"--json {known.json_file!r}: there is no directory {str(Path(known.json_file).parent)!r}.")
    try:
        module, datamodule, trainer = read_config(others, known.preset)
        run, config = run_to_trace(module, datamodule, trainer, known.tokens, known.batch)
        with Console(stderr=True).status("tracing the run, and others beside it"):
            fits = estimate(run, config, budget=known.budget, json_file=known.json_file, name=known.preset)
    except PaCAError as error:
        if known.preset is None and NOT_LOADED in str(error):
            shapes = ", ".join(PRESETS)
            raise PaCAError(f"{error}\nA known shape needs no files: --preset NAME, one of {shapes}.") from error
        raise
    return 0 if fits else 1


def _options() -> argparse.ArgumentParser:
    options = PlainShortErrors(
        prog="paca-lightning estimate",
        usage="%(prog)s --config FILE [options] [options of fit that override the config]",
        description="""\
Predict the peak memory of each device in a run, by kind, beside LoRA and full
fine-tuning. The model is built from its config.json alone, and one step of the
run's own code is traced without computing: neither weights nor devices are
needed. Exit code 1: the run does not fit the budget.""",
        epilog="""examples:
  paca-lightning estimate --config configs/quickstart.yaml --budget 4GiB
  paca-lightning estimate --config configs/oasst1-llama3-8b.yaml \\
      --preset llama3-8b --tokens 2048 --batch 1 --budget 80GB
  paca-lightning estimate --config FILE --trainer.devices 8 --trainer.strategy paca_fsdp2

paca-lightning fit --help lists what overrides the config.""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    options.add_argument(
        "--budget",
        metavar="SIZE",
        help="memory of one device, such as 24GiB or 80GB: says whether the run fits, the longest sequence that fits "
        "with each method, and the largest batch. Leave 1 to 2 GiB of a GPU to its context and to gaps",
    )
    options.add_argument("--json", dest="json_file", metavar="FILE", help="write the same figures there, in bytes")
    options.add_argument(
        "--preset",
        metavar="NAME",
        help="a known shape in place of the config's model, which then need not be downloaded: " + ", ".join(PRESETS),
    )
    options.add_argument("--tokens", type=int, metavar="N", help="length of a sequence. Default: the data's max_length")
    options.add_argument(
        "--batch", type=int, metavar="N", help="sequences of a micro-batch. Default: the data's batch_size"
    )
    return options
