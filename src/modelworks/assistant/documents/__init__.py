"""Documents and images that are dropped into a conversation, and what of them a model is given.

`reader` is a process of its own, with limits, in which `parsers` and `images` read what a stranger made; `reading`
starts it and can end it. `passages` splits what was read, `store` keeps it, and `library.Library` is all of them for
`assistant.chat`: it takes documents in, and says what of them stands before a question (`prompt`).
"""
