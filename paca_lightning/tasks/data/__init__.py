"""Instruction data, from files to batches.

`locations`, `records` and `json_rows` find and read rows; `formats`, `converters` and `turns` make conversations of
them; `template`, `answers` and `chat` render and mask these; `remarks` and `report` tell what became of rows and texts.
`tokenization` caches the tokens, `packing` and `sampler` plan batches, `collate` pads them, `loader` iterates.
These modules may import `core`, `transformers` and `datasets`, and nothing else of the package.
`stream`, `stream_loader` and `streaming` train on files larger than memory. `preferences`, `preference_encoder` and
`preference_batches` make pairs, and answers with a label, of rows, documents of these, and batches.
Limits: text only; without streaming, a split is tokenized whole before training, and its lengths are kept in memory.
"""
