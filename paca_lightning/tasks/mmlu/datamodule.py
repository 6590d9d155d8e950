"""A data module of MMLU questions with their answers, resumable in the middle of an epoch."""

from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.data.collate import DocumentReader, PadCollator
from paca_lightning.tasks.data.loader import ResumableLoader
from paca_lightning.tasks.data.new_tokens import new_tokens_of
from paca_lightning.tasks.data.sampler import BatchOrder, share_of
from paca_lightning.tasks.data.settings import check_numbers
from paca_lightning.tasks.data.tokenizer import load_tokenizer, pad_token_id
from paca_lightning.tasks.mmlu.callback import MMLUEvaluation
from paca_lightning.tasks.mmlu.questions import Question, sample
from paca_lightning.tasks.mmlu.sources import SPLITS, read_file, read_split
from paca_lightning.tasks.mmlu.subjects import check_subjects
from paca_lightning.tasks.mmlu.training_samples import LossOn, Overlong, TrainingSamples, training_samples


class MMLUDataModule(LightningDataModule):
    """MMLU (Hendrycks et al., 2021, arXiv 2009.03300) as batches of ``input_ids``, ``labels`` and ``attention_mask``.

    A sample is a question with its choices in the benchmark's wording, and the letter of its answer. It begins with a
    beginning-of-sequence token if the tokenizer adds one, and has no end-of-sequence token. Batches of the validation
    and test splits look alike, so their loss compares with the training loss. :class:`MMLUEvaluation` measures the
    accuracy; it is added to the trainer's callbacks if it is missing.

    Args:
        tokenizer: Directory or hub id of the tokenizer; usually the model's.
        source: A local directory of MMLU (the original CSV folders, saved data sets, Parquet), or a hub id.
        train: What to train on: splits of the source, or files of questions (.csv as the original ones, .parquet,
            .json, .jsonl, saved data sets). ``[dev, validation]`` where there is no ``auxiliary_train``.
        validation_split: Split of the validation. It must not be trained on.
        subjects: Subjects to use. Default: all 57. ``auxiliary_train`` has none and is used whole.
        limit: Questions of each subject in validation and test, drawn by ``seed``. Default: all.
        loss_on: Train the ``answer`` alone, or the whole ``text``.
        max_length: Most tokens of a sample.
        overlong: What to do with longer samples: raise an ``error``, ``drop`` them, or ``cut`` the beginning of their
            question. The number is reported.
        batch_size: Samples in a batch of each process.
        pad_to_multiple_of: Batches are padded to a multiple of this length, up to ``max_length``.
        num_workers: Processes that prepare batches ahead. Samples are tokenized once at the start, so 0 is fast.
        seed: Seed of the order of batches and of the draw.
        revision: Branch, tag or commit of the tokenizer on the hub.
        trust_remote_code: Whether to run code that comes with the tokenizer.

    Raises:
        PaCAError: If a setting is wrong; and, from ``setup``, a source, a row or a tokenizer that cannot be used.
    """

    tokenizer: PreTrainedTokenizerBase

    def __init__(
        self,
        tokenizer: str,
        source: str = "cais/mmlu",
        train: Sequence[str] = ("auxiliary_train",),
        validation_split: str = "validation",
        subjects: list[str] | None = None,
        limit: int | None = None,
        loss_on: LossOn = "answer",
        max_length: int = 512,
        overlong: Overlong = "error",
        batch_size: int = 4,
        pad_to_multiple_of: int = 8,
        num_workers: int = 0,
        seed: int = 0,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        check_numbers(self.hparams)
        if isinstance(train, str) or not train:
            raise PaCAError(f"train must be a list of splits or files such as [auxiliary_train], not {train!r}.")
        if subjects is not None:
            check_subjects(subjects)
        self.samples: dict[str, TrainingSamples] = {}

    def prepare_data(self) -> None:
        """Download the source on one process of each node, if it is a hub id."""
        if not Path(self.hparams["source"]).expanduser().is_dir():
            for split in {"dev", self.hparams["validation_split"], "test", *self.hparams["train"]} & set(SPLITS):
                read_split(self.hparams["source"], split)

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenize what a stage needs, and add the evaluation callback."""
        needed = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",)}
        if not self.samples:
            self.tokenizer = load_tokenizer(
                self.hparams["tokenizer"],
                revision=self.hparams["revision"],
                trust_remote_code=self.hparams["trust_remote_code"],
                new_tokens=new_tokens_of(self),
            )
        if stage == "fit" and self.hparams["validation_split"] in self.hparams["train"]:
            raise PaCAError(
                f"The split {self.hparams['validation_split']!r} is both trained on and validated on. Set "
                "validation_split to another, such as 'test'."
            )
        for name in needed.get(stage or "", ()):
            if name not in self.samples:
                self.samples[name] = self._tokenize(name)
        if self.trainer is not None:
            self._attach_evaluation()

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled batches of training samples."""
        return self._loader("train", shuffle=getattr(self.trainer, "overfit_batches", 0) == 0)

    def val_dataloader(self) -> ResumableLoader:
        """Batches of the validation split."""
        return self._loader("validation")

    def test_dataloader(self) -> ResumableLoader:
        """Batches of the test split."""
        return self._loader("test")

    def _attach_evaluation(self) -> None:
        assert self.trainer is not None
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        attached = [callback for callback in callbacks if isinstance(callback, MMLUEvaluation)]
        if not attached:
            attached = [MMLUEvaluation()]
            callbacks += attached
            rank_zero_info("MMLUDataModule added the callback MMLUEvaluation, to report accuracy.")
        names = ("source", "subjects", "limit", "validation_split")
        for callback in attached:
            callback.take_defaults(**{name: self.hparams[name] for name in names})

    def _questions(self, name: str) -> list[Question]:
        hparams = self.hparams
        if name == "train":
            return [question for part in hparams["train"] for question in self._training_part(part)]
        split = hparams["validation_split"] if name == "validation" else name
        return sample(read_split(hparams["source"], split, hparams["subjects"]), hparams["limit"], hparams["seed"])

    def _training_part(self, part: str) -> list[Question]:
        if part in SPLITS:
            return read_split(self.hparams["source"], part, self.hparams["subjects"])
        return read_file(Path(part))

    def _tokenize(self, name: str) -> TrainingSamples:
        hparams = self.hparams
        samples = training_samples(
            self._questions(name),
            self.tokenizer,
            max_length=hparams["max_length"],
            loss_on=hparams["loss_on"],
            overlong=hparams["overlong"],
        )
        rank_zero_info(
            f"MMLU {name}: {len(samples.lengths):,} samples, {samples.lengths.sum():,} tokens ({samples.cut:,} cut, "
            f"{samples.dropped:,} dropped, as they exceed max_length={hparams['max_length']})."
        )
        return samples

    def _loader(self, name: str, shuffle: bool = False) -> ResumableLoader:
        samples, hparams = self.samples[name], self.hparams
        order = BatchOrder(
            samples.lengths,
            hparams["batch_size"],
            trained=samples.trained_lengths,
            shuffle=shuffle,
            seed=hparams["seed"],
            **share_of(self.trainer),
            name=f"MMLU {name}",
        )
        collator = PadCollator(pad_token_id(self.tokenizer), hparams["pad_to_multiple_of"], hparams["max_length"])
        trainer = self.trainer if name == "train" else None
        return ResumableLoader(DocumentReader(samples.dataset), order, collator, hparams["num_workers"], trainer)
