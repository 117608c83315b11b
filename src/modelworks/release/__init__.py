"""Weights in and out: importers of others' formats, packages for others' tools, and the proof that they agree.

Nothing is imported here, so that a room which only needs the package's name doesn't load torch.
`package.release_run` turns a run into a release, `huggingface` reads and writes Hugging Face folders, `grok1` and
`gguf_import` read what others published, `verify` holds a model against reference logits.
"""
