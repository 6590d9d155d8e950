"""Lightning's DDP with torch's own communication hooks, which compress gradients."""

from typing import Any, Literal, get_args

from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from paca_lightning.core.errors import PaCAError

Hook = Literal["power_sgd", "fp16", "bf16"]


class CompressedDDPStrategy(DDPStrategy):
    """DDP whose gradients are compressed: ``strategy="paca_compressed_ddp"``.

    The hooks are torch's. Lightning's ``DDPStrategy(ddp_comm_hook=...)`` leaves them out on CPUs without a word, and
    YAML cannot build PowerSGD's state for it. What PowerSGD has still to send is in no checkpoint, so a run that is
    resumed with it is not bitwise the same.

    Args:
        compression: ``power_sgd`` (arXiv 1905.13727) with error feedback, or gradients in ``fp16`` or ``bf16``
            (torch's hook for bf16 needs GPUs).
        rank: Of PowerSGD's approximation of each gradient; below PaCA's r, or there is little to gain.
        start: Steps before PowerSGD begins, uncompressed; at least 2.
        **kwargs: For ``DDPStrategy``.

    Raises:
        PaCAError: If a setting is impossible.
    """

    def __init__(self, compression: Hook = "power_sgd", rank: int = 4, start: int = 10, **kwargs: Any) -> None:
        if compression not in get_args(Hook):
            raise PaCAError(f"compression={compression!r} is none of {', '.join(get_args(Hook))}.")
        if rank < 1 or start < 2:
            raise PaCAError(f"rank={rank} has to be at least 1, and start={start} at least 2.")
        super().__init__(**kwargs)
        self.compression, self.rank, self.start = compression, rank, start
        self.power_sgd: powerSGD_hook.PowerSGDState | None = None

    @override
    def setup_environment(self) -> None:
        """Check what the devices can do.

        Raises:
            PaCAError: If bf16 is asked for on CPUs.
        """
        if self.compression == "bf16" and self.root_device.type == "cpu":
            raise PaCAError("torch compresses gradients to bf16 on GPUs alone. Set compression: fp16 or power_sgd.")
        super().setup_environment()

    @override
    def configure_ddp(self) -> None:
        """Wrap the model, and register the hook."""
        super().configure_ddp()
        assert isinstance(self.model, DistributedDataParallel)
        if self.compression == "power_sgd":
            self.power_sgd = powerSGD_hook.PowerSGDState(None, self.rank, self.start)
            self.model.register_comm_hook(self.power_sgd, powerSGD_hook.powerSGD_hook)
        else:
            hooks = {"fp16": default_hooks.fp16_compress_hook, "bf16": default_hooks.bf16_compress_hook}
            self.model.register_comm_hook(None, hooks[self.compression])


StrategyRegistry.register(
    "paca_compressed_ddp", CompressedDDPStrategy, description="DDP with torch's PowerSGD, fp16 or bf16 gradients"
)
