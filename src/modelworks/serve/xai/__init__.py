"""xAI's own protocol, gRPC, in front of the same application, so that the Python package `xai-sdk` works with it.

There is no second gateway here. A message is turned into the request that our API takes, the application answers it
inside this process (`serve.within`), and the answer is turned back (`chat`, `kept`, `services`). Keys, tiers, turns,
limits, figures and log lines are the application's, and so are its refusals, under gRPC's names for them (`server`).
The message classes are `xai-sdk`'s own.
"""
