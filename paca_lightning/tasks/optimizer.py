"""Builds a run's optimizer and its schedule, and names what they refuse."""

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.schedules import planned


def configured(
    module: LightningModule, optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable | None
) -> OptimizerLRScheduler:
    """What ``configure_optimizers`` of a module returns: the optimizer of all parameters that require a gradient.

    Args:
        module: In a run.
        optimizer: Called with the parameters to train.
        lr_scheduler: Called with the optimizer, if there is to be a schedule.

    Raises:
        PaCAError: If nothing is to be trained, a setting is refused (such as a negative learning rate), or the schedule
            does not fit the run (see :func:`~paca_lightning.tasks.schedules.planned`).
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not parameters:
        raise PaCAError(
            "Every parameter is frozen: there is nothing to train. Add a callback that makes some trainable, such "
            "as PaCAStrategy, or leave the model unfrozen. After merge() nothing is left to train."
        )
    try:
        built = optimizer(parameters)
        schedule = None if lr_scheduler is None else lr_scheduler(built)
    except PaCAError:
        raise
    except (ValueError, TypeError) as error:
        raise PaCAError(f"The optimizer or its schedule refuses a setting: {error}") from error
    if schedule is None:
        return {"optimizer": built}
    return {"optimizer": built, "lr_scheduler": planned(schedule, module.trainer)}
