"""How PaCAStrategy turns PaCA off for a while."""

from contextlib import AbstractContextManager

from lightning.pytorch import LightningModule

from paca_lightning.conversion.revert import disable_paca
from paca_lightning.core.base_model import KeepsBaseModel
from paca_lightning.core.errors import PaCAError


class DisablesPaCA(KeepsBaseModel):
    """Notes the module that a run has converted."""

    _converted: LightningModule | None = None

    def disable(self) -> AbstractContextManager[None]:
        """Inside this context the model of the last run is the base model, bitwise (see ``disable_paca``).

        Raises:
            PaCAError: If no run has converted a model yet.
        """
        if self._converted is None:
            raise PaCAError("PaCAStrategy.disable: no model is converted yet. Start a run first.")
        return disable_paca(self._converted)
