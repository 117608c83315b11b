"""The network: one decoder for the Grok family and its open cousins, in PyTorch.

Nothing is imported here, so that a room which only needs the package's name doesn't load torch.
`modelworks.model.decoder.Decoder` is the network; `precision`, `attention`, `experts` and `loss` are its parts.
"""
