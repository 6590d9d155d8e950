"""python train.py fit --config config.yaml"""

from classifier import BrightQuadrants, Classifier
from lightning.pytorch.cli import LightningCLI

if __name__ == "__main__":
    LightningCLI(Classifier, BrightQuadrants, auto_configure_optimizers=False)
