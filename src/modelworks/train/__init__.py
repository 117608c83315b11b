"""Training: the loop, its optimizers and schedules, and the record that a run leaves behind.

`train.loop.train` runs a spec; `train.record` reads what a run has written and needs no PyTorch.
"""
