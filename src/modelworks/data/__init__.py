"""Text in, packed token batches out: deterministic, resumable, with progress.

Three ideas. A source is a stream of documents and of records that can't be read, and nobody holds all of it. What was
tokenised once is kept under a hash of what went in, as memory-mapped shards. The order in which sequences are seen
is a function of the seed and of one integer, so a run resumes without seeking.

>>> from modelworks.data import prepare
>>> data = prepare(run.data, run.model.vocab, data_folder())  # doctest: +SKIP
>>> data.sequences("train", position=0, count=8, seq_len=512, seed=1337).shape  # doctest: +SKIP
(8, 513)
"""

from modelworks.data.packed import PackedDataset
from modelworks.data.preparation import prepare

__all__ = ["PackedDataset", "prepare"]
