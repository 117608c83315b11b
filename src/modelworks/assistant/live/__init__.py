"""Live knowledge: sources that refresh themselves, and what of them stands before a question.

`guard` decides which addresses may be connected to, and `fetching` fetches from no others, politely. What was fetched
is read in the process where documents are (`outline` reads feeds and site maps there). `rounds` refreshes a source of
each kind, `refresher` does so when it is time, `store` keeps sources and their items, and `search` asks a search
engine when a question is asked. `knowledge.Live` is all of them for `assistant.chat`.
"""
