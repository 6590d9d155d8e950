"""The options of ``compare``, and what its help teaches."""

import argparse

from paca_lightning.tools.compare.parsing import PARAMETERS, RANK

PROG = "paca-lightning compare"

DESCRIPTION = """\
Train each method on the run of a config, at its own best learning rate, and
compare what was learned at which cost. For each method, the learning rate is
searched by validation; then the run is repeated with other seeds. Each run is
a `fit` of its own; all methods see the same rows in the same order, for the
same number of steps, under the config's schedule.

A method is NAME[:SIZE][,OPTION=VALUE]...:
  paca:16         PaCA, 16 columns of each weight. Options: every setting of
                  PaCAConfig; what is not given is as the config says
  lora:8, dora:8, ia3, prefix:20, prompt:20, llama-adapter:10, layernorm, ...
                  PEFT's methods, by the names of its registry as well.
                  Options: every field of the method's PEFT config, and
                  quantize=nf4 for the frozen layers
  qlora:8         lora:8,quantize=nf4; PaCA's is paca:16,quantize=nf4
  bottleneck:64, loreft:4
                  bottleneck adapters of that width, LoReFT of that rank
  galore:128, apollo:128
                  all parameters, by an optimizer that projects to that rank
  full            all parameters are trained
  floor           nothing is trained
Options of every method: name (its label) and lr (auto, 1e-3 or 1e-4:1e-2).

A command that was stopped goes on where it was: finished runs are kept."""

EPILOG = """\
examples:
  paca-lightning compare --config configs/quickstart.yaml --methods paca:16 lora:8
  paca-lightning compare --config configs/quickstart.yaml --jobs 2 --minutes 60 \\
      --methods floor paca:16 paca:16,selection=weight_norm,name=norm lora ia3 prefix:20 \\
      --match parameters --widen --output runs/study
  paca-lightning compare --config configs/debug.yaml --steps 20 --trials 3 --seeds 2 --methods paca:8 full

Other options are those of fit, and change all configs: paca-lightning fit --help."""


def options() -> argparse.ArgumentParser:
    """The parser of ``compare``'s own options."""
    parser = argparse.ArgumentParser(
        prog=PROG,
        usage="%(prog)s --config FILE [FILE ...] --methods METHOD [METHOD ...] [options] [options of fit]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", nargs="+", required=True, metavar="FILE", help="runs to compare on: one table for each")
    add("--methods", nargs="+", required=True, metavar="METHOD", help="methods to compare, as above")
    add(
        "--match",
        choices=(RANK, PARAMETERS),
        default=RANK,
        help="what a method without a SIZE shares with the first one: its rank, or the number of trained parameters, "
        "as nearly as whole sizes allow (default: rank)",
    )
    add("--seeds", type=int, default=3, metavar="N", help="runs of each method at its best learning rate (default: 3)")
    add(
        "--lr",
        default="auto",
        metavar="SPACE",
        help="learning rates to search: auto (those that suit each method), LOW:HIGH, or one number for all (default: "
        "auto)",
    )
    add("--trials", type=int, default=7, metavar="N", help="trials of each search, at least 3 (default: 7)")
    add(
        "--widen",
        action="store_true",
        help="go on beyond an edge of the search if the best learning rate lies there; without it, a note says so",
    )
    add("--steps", type=int, metavar="N", help="optimizer steps of each run (default: as the config says)")
    add("--search-steps", type=int, metavar="N", help="the same for the trials of a search (default: as each run)")
    add(
        "--metric",
        default="val/loss",
        metavar="NAME",
        help="validation metric that decides, after the last step (default: val/loss)",
    )
    add("--maximize", action="store_true", help="the metric is the better the larger it is, such as an accuracy")
    add("--lr-key", metavar="KEY", help="where the learning rate is in the config, such as model.init_args.lr")
    add("--jobs", type=int, default=1, metavar="N", help="runs at a time; on several GPUs each has one (default: 1)")
    add("--minutes", type=float, metavar="N", help="start no run after this time; the same command goes on later")
    add(
        "--cost-steps",
        type=int,
        default=10,
        metavar="N",
        help="timed steps of each method, taken in turns when all runs are finished; 0: none (default: 10)",
    )
    add("--output", default="runs/compare", metavar="DIRECTORY", help="for all results (default: runs/compare)")
    return parser
