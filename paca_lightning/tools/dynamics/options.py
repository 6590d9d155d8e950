"""The options of ``dynamics``, and what its help teaches."""

import argparse

from paca_lightning.tools.short_errors import PlainShortErrors

PROG = "paca-lightning dynamics"

DESCRIPTION = """\
Look along a history that AdapterHistory wrote, without training: the base model
is loaded once, and the adapters are swapped. At each step:
  loss         on training rows, held-out rows, and any file of yours (--rows),
               such as one that shows what the base model knew
  recitation   the share of rows that the model continues exactly by greedy
               decoding, given all before the answer and its first K tokens;
               and the mean share of tokens before the first error. Training
               rows beside held-out ones: the difference is memorized
  movement     how far each layer's columns moved, in which direction (cosine to
               the last update), in how many directions (effective rank)
Writes dynamics.csv, layers.csv, recited.csv, plots, and index.html, which opens
without a network. A command that was stopped goes on where it was."""

EPILOG = """\
examples:
  paca-lightning dynamics runs/quickstart/version_0/history
  paca-lightning dynamics runs/quickstart/version_0/history --k 8 --steps 0 64 81
  paca-lightning dynamics runs/quickstart/version_0/history --rows facts=facts.jsonl

Other options are those of fit, and change the config, such as
--data.init_args.batch_size 16: paca-lightning fit --help."""


def options() -> argparse.ArgumentParser:
    """The parser of ``dynamics``' own options."""
    parser = PlainShortErrors(
        prog=PROG,
        usage="%(prog)s HISTORY [options] [options of fit that override the config]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("history", metavar="HISTORY", help="directory that AdapterHistory wrote")
    add(
        "--config",
        metavar="FILE",
        help="of the run, for its model and data (default: config.yaml beside the history, where fit leaves it)",
    )
    add(
        "--rows",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="also measure these rows, in any format of the data module; may be given several times",
    )
    add(
        "--k",
        type=int,
        default=32,
        metavar="N",
        help="trained tokens of a row that the model is shown before it recites (default: 32, as Pythia's)",
    )
    add(
        "--limit",
        type=int,
        default=256,
        metavar="N",
        help="rows of each set, drawn at random, the same at each step; 0: all (default: 256)",
    )
    add("--steps", type=int, nargs="+", metavar="N", help="steps to measure (default: all of the history)")
    add("--output", metavar="DIRECTORY", help="for all results (default: dynamics, beside the history)")
    return parser
