"""Lightning's demo of a language model under LightningCLI: python train.py fit

It reads data/wikitext-2.txt, and downloads that file only if it is not there.
"""

from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos import LightningTransformer

if __name__ == "__main__":
    LightningCLI(LightningTransformer)
