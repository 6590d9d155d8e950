"""Instruction data, from files to batches: `records` reads rows, `formats` turns them into conversations.

Then `chat` renders and masks them, `tokenization` caches the tokens, `packing` and `sampler` plan the batches,
`collate` pads them, and `loader` iterates over them and resumes in the middle of an epoch.
These modules may import `core`, `transformers` and `datasets`, and nothing else of the package.
Limits: a split is tokenized whole before training, and its lengths are kept in memory (8 bytes a conversation).
"""
