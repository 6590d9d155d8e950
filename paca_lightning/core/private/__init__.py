"""Every private API of another library that the package relies on, one module a library.

A private name (``_x``, or a module below a private one) may change in any release. So nothing outside this folder uses
one: callers ask a function here, which says why no public API serves and what is relied on. Each function has a canary
in ``tests/core/private``, the first tests to run with a new release. Other libraries than torch are imported
inside the functions.

Private methods that our classes override or replace, and private attributes that they share with a base class, cannot
move here. They are listed in :data:`OVERRIDES`.
"""

from typing import NamedTuple


class Override(NamedTuple):
    """A private method or attribute of another library's class that our code overrides, replaces or shares.

    Attributes:
        owners: Dotted names of the classes that have it.
        name: Of the method or attribute.
        used_in: Modules of ours, such as ``layers.base``.
        why: Why no public API serves.
    """

    owners: tuple[str, ...]
    name: str
    used_in: tuple[str, ...]
    why: str


_CONNECTOR = "lightning.pytorch.trainer.connectors.accelerator_connector._AcceleratorConnector"
_DDP = "lightning.pytorch.strategies.DDPStrategy"
_MODEL_PARALLEL = "lightning.pytorch.strategies.ModelParallelStrategy"

OVERRIDES = (
    Override(
        ("torch.nn.Module",),
        "_apply",
        (
            "layers.base",
            "layers.experts",
            "layers.nf4_linear",
            "layers.nf4_plain",
            "layers.rows",
            "tasks.metrics",
            "tasks.wide_buffers",
            "tools.memory.lora",
        ),
        "to(), half(), cuda() and Lightning's precision plugins all call it, and fp32 tensors stay wide in it",
    ),
    Override(
        ("torch.nn.Module",),
        "_load_from_state_dict",
        ("layers.base", "layers.experts", "layers.rows"),
        "PyTorch documents it for subclasses: it loads a layer's own tensors, whose hooks cannot reorder them",
    ),
    Override(
        (_MODEL_PARALLEL, _DDP),
        "_get_process_group_backend",
        ("strategies.fsdp2.strategy", "strategies.hpu.mixins"),
        "the backend of the process group is only asked for here",
    ),
    Override(
        (_MODEL_PARALLEL,),
        "_data_parallel_size",
        ("strategies.fsdp2.strategy",),
        "the constructor takes no size but 'auto' or a number, and the number of ranks is known later",
    ),
    Override(
        (_MODEL_PARALLEL, _DDP),
        "_process_group_backend",
        ("strategies.hpu.mixins",),
        "the default backend of an unknown device is none",
    ),
    Override(
        (_MODEL_PARALLEL, _DDP),
        "_timeout",
        ("strategies.hpu.mixins",),
        "the process group is initialised before the strategy does it, with the timeout it was given",
    ),
    Override(
        ("lightning.pytorch.strategies.Strategy",),
        "_precision_plugin",
        ("strategies.hpu.mixins",),
        "the setter of the public property precision_plugin is overridden and has to store what it checked",
    ),
    Override(
        ("torch.optim.lr_scheduler.LRScheduler",),
        "_last_lr",
        ("tasks.schedules",),
        "get_last_lr() returns it, and it changes when a schedule learns the length of the run",
    ),
    Override(
        ("lightning.pytorch.cli.LightningCLI",),
        "_parse_ckpt_path",
        ("tools.run_config",),
        "it overwrites given settings with a checkpoint's hyperparameters, and no argument turns that off",
    ),
    Override(
        ("lightning.pytorch.cli.LightningCLI",),
        "_run_subcommand",
        ("tools.run_config",),
        "the hooks before and after a subcommand do not see the error that it raises",
    ),
    Override(
        ("torchft.process_group.ProcessGroupGloo",),
        "_create_pg",
        ("strategies.diloco.group",),
        "it makes Gloo's group without a device, so that Gloo listens at the address of the machine's own name",
    ),
    *(
        Override(
            (_CONNECTOR,),
            name,
            ("strategies.hpu.connector",),
            "the connector knows a fixed list of accelerators: it refuses a registered one with strategy='auto'",
        )
        for name in (
            "_choose_auto_accelerator",
            "_set_parallel_devices_and_init_accelerator",
            "_choose_strategy",
            "_check_strategy_and_fallback",
            "_parallel_devices",
            "_num_nodes_flag",
            "_strategy_flag",
        )
    ),
)
