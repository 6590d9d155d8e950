"""The Lightning strategy whose replicas exchange what they trained every few steps, over slow connections."""

import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from paca_lightning.core.errors import PaCAError
from paca_lightning.layers.base import paca_layers
from paca_lightning.strategies.diloco.address import lighthouse_place
from paca_lightning.strategies.diloco.lone import LoneStrategy
from paca_lightning.strategies.diloco.settings import Compression, Outer, from_environment

if TYPE_CHECKING:
    from paca_lightning.strategies.diloco.outer import OuterLoop

STATE = "paca_diloco"
"""Key of the outer loop's state in a checkpoint."""


class DiLoCoStrategy(LoneStrategy):
    """DiLoCo (arXiv 2311.08105) on torchft: ``strategy="paca_diloco"``. Each replica is a run of its own.

    A replica trains on its share of the training rows and on one device. Every ``sync_every`` optimizer steps the
    replicas average how far they moved, and an outer SGD with Nesterov momentum moves all of them alike. A replica that
    dies or is late does not stop the others: when it comes, it takes the state of one of them, and its place in the
    run. Only what is trained is sent.

    Each replica evaluates all validation rows, and writes logs and checkpoints of its own.

    Args:
        replicas: How many share the training rows. Default: the environment's ``NUM_REPLICA_GROUPS``.
        replica: Number of this one, from 0. Default: the environment's ``REPLICA_GROUP_ID``.
        lighthouse: Where ``torchft_lighthouse`` listens, ``http://host:port``. Default: the environment's
            ``TORCHFT_LIGHTHOUSE``.
        sync_every: Optimizer steps between two exchanges, H.
        outer_lr: Learning rate of the outer SGD.
        outer_momentum: Its Nesterov momentum; 0 is plain SGD.
        fragments: Exchange the parameters in that many parts, in turns (Streaming DiLoCo, arXiv 2501.18512).
        compression: What replicas send of their change: all of it (``none``), ``bf16``, ``int8``, or only its largest
            values (``top_k``). The last two send later what they leave out.
        top_k: Share of the values that ``top_k`` sends.
        min_replicas: With fewer present, nothing is exchanged, and the steps since the last exchange are lost.
        host: Name or address at which others reach this replica. Default: its address on the network on which it
            reaches the lighthouse.
        timeout: Of an exchange. A replica that dies in one costs the others these seconds at most.
    """

    def __init__(
        self,
        replicas: int | None = None,
        replica: int | None = None,
        lighthouse: str | None = None,
        sync_every: int = 100,
        outer_lr: float = 0.7,
        outer_momentum: float = 0.9,
        fragments: int = 1,
        compression: Compression = "none",
        top_k: float = 0.01,
        min_replicas: int = 1,
        host: str | None = None,
        timeout: timedelta = timedelta(seconds=60),
    ) -> None:
        super().__init__()
        self.settings = Outer(sync_every, outer_lr, outer_momentum, fragments, compression, top_k)
        self._given = replicas, replica, lighthouse
        self.min_replicas, self.host, self.timeout = min_replicas, host, timeout
        self.outer: OuterLoop | None = None
        self._trainer: pl.Trainer | None = None
        self._sent = 0  # bytes until the exchange before

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """How training rows are shared. Each replica evaluates all rows."""
        stage = None if self._trainer is None else self._trainer.state.stage
        evaluates = stage is not None and stage is not RunningStage.TRAINING
        return {"num_replicas": 1, "rank": 0} if evaluates else {"num_replicas": self.replicas, "rank": self.replica}

    @override
    def setup_environment(self) -> None:
        """Check what can be checked before the model is built.

        Raises:
            PaCAError: If torchft is missing, the run has several devices, or it is not said which replica this is.
        """
        replicas, replica, lighthouse = self._given
        self.replicas = from_environment(replicas, "replicas", "NUM_REPLICA_GROUPS")
        self.replica = from_environment(replica, "replica", "REPLICA_GROUP_ID")
        self.lighthouse = lighthouse or os.environ.get("TORCHFT_LIGHTHOUSE", "")
        if not 0 <= self.replica < self.replicas:
            raise PaCAError(f"replica={self.replica} is none of the {self.replicas} replicas, which count from 0.")
        if not 1 <= self.min_replicas <= self.replicas:
            raise PaCAError(f"min_replicas={self.min_replicas} has to lie from 1 to replicas={self.replicas}.")
        if not self.lighthouse:
            raise PaCAError("set the strategy's lighthouse, or TORCHFT_LIGHTHOUSE, to http://HOST:29510.")
        lighthouse_place(self.lighthouse)
        os.environ.setdefault("RUST_LOG", "warn")  # its servers tell of each exchange otherwise, in ten lines
        try:
            import torchft  # noqa: F401
        except ImportError as error:
            raise PaCAError("paca_diloco needs torchft. Run: pip install 'paca-lightning[diloco]'.") from error
        if self.parallel_devices and len(self.parallel_devices) > 1:
            raise PaCAError(
                f"a replica of paca_diloco trains on one device, and this run has {len(self.parallel_devices)}. Set "
                "devices: 1 and start one run for each device."
            )
        super().setup_environment()

    @override
    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        """Build the optimizers and join the other replicas.

        Raises:
            PaCAError: If there are several optimizers, or no lighthouse answers.
        """
        from paca_lightning.strategies.diloco.outer import OuterLoop

        super().setup_optimizers(trainer)
        self._trainer = trainer
        if len(self.optimizers) != 1:
            raise PaCAError(f"paca_diloco exchanges what one optimizer trains; the module has {len(self.optimizers)}.")
        self.outer = OuterLoop(
            self.optimizers[0],
            self.settings,
            self,
            replica=self.replica,
            lighthouse=self.lighthouse,
            host=self.host,
            min_replicas=self.min_replicas,
            timeout=self.timeout,
        )
        trained = sum(p.numel() * p.element_size() for g in self.optimizers[0].param_groups for p in g["params"])
        rank_zero_info(
            f"DiLoCo: replica {self.replica} of {self.replicas}, which others reach at {self.outer.host}; "
            f"{trained / 2**20:.1f} MiB are exchanged every {self.settings.sync_every} steps, compression: "
            f"{self.settings.compression}. Lighthouse: {self.lighthouse}."
        )

    def on_train_start(self) -> None:
        """Check that the run is long enough for exchanges.

        Raises:
            PaCAError: If it ends before the first one.
        """
        assert self._trainer is not None
        self._steps = int(self._trainer.estimated_stepping_batches)
        every = self.settings.sync_every
        if self._steps < every:
            raise PaCAError(f"the run has {self._steps} steps and sync_every={every}: replicas would never meet.")

    # What the outer loop asks of the run: strategies.diloco.outer.Run.

    def identity(self) -> list[str | Tensor]:
        """Names and columns of the trained layers."""
        assert self.lightning_module is not None
        names = [name for name, parameter in self.lightning_module.named_parameters() if parameter.requires_grad]
        columns = [
            part
            for _, layer in paca_layers(self.lightning_module)
            for part in (layer.paca_indices, str(layer.scaling), layer.paca_scale)
            if part is not None
        ]
        return [*names, *columns]

    def position(self) -> dict[str, Any]:
        """Optimizer steps and learning rate schedules."""
        assert self._trainer is not None
        return {
            "steps": self._trainer.global_step,
            "schedules": [config.scheduler.state_dict() for config in self.lr_scheduler_configs],
        }

    def take_position(self, position: dict[str, Any]) -> None:
        """Go on at another replica's step, so that all end together."""
        assert self._trainer is not None
        steps = self._trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step
        late = position["steps"] - self._trainer.global_step
        steps.total.completed += late
        steps.total.ready += late
        for config, saved in zip(self.lr_scheduler_configs, position["schedules"], strict=True):
            config.scheduler.load_state_dict(saved)
        rank_zero_info(f"DiLoCo: took the state of another replica, {late} steps ahead.")

    def at_last_step(self) -> bool:
        """Whether the run ends with the step that is being taken."""
        assert self._trainer is not None
        return self._trainer.global_step + 1 >= self._steps

    def exchanged(self, outer: "OuterLoop") -> None:
        """Log an exchange, and say if it failed."""
        assert self._trainer is not None
        if outer.failed:
            rank_zero_warn(
                f"DiLoCo: the exchange at step {self._trainer.global_step + 1} failed ({outer.failed} in a row); the "
                f"steps since the last one are lost. If all fail: others must reach this replica at {outer.host}; set "
                "the strategy's host to another address if they do not.",
            )
        sent = outer.group.sent_bytes
        values = {
            "diloco/replicas": outer.replicas,
            "diloco/bytes_sent": sent - self._sent,
            "diloco/bytes_sent_total": sent,
        }
        self._sent = sent
        for logger in self._trainer.loggers:
            logger.log_metrics({name: float(value) for name, value in values.items()}, step=self._trainer.global_step)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint that holds the outer optimizer as well."""
        if self.outer is not None and "optimizer_states" in checkpoint:
            checkpoint[STATE] = self.outer.state_dict()
        super().save_checkpoint(checkpoint, filepath, storage_options)

    @override
    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Restore the inner and the outer optimizer.

        Raises:
            PaCAError: If the checkpoint is of another strategy.
        """
        super().load_optimizer_state_dict(checkpoint)
        if STATE not in checkpoint:
            raise PaCAError(
                "the checkpoint is not of paca_diloco: it has no outer optimizer. Start from its adapter instead: "
                "PaCAStrategy(adapter=...)."
            )
        assert self.outer is not None
        self.outer.load_state_dict(checkpoint[STATE])
        self._sent = self.outer.group.sent_bytes

    @override
    def teardown(self) -> None:
        """Leave the other replicas."""
        if self.outer is not None:
            self.outer.close()
            self.outer = None
        super().teardown()


StrategyRegistry.register("paca_diloco", DiLoCoStrategy, description="DiLoCo on torchft, for slow connections")
