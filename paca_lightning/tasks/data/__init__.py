"""Data for language-model tasks: reading, chat formats, tokenization, packing, and a loader that resumes anywhere."""
