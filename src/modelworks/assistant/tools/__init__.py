"""What a model may ask for while it answers: to compute, to run code, to search documents, to call other servers.

A tool is a name, a description, a JSON schema and a call (`tool`). `toolbox` has those of a server, `loop` carries out
what an answer asks for, with the person's consent where a tool needs it, and `store` keeps every call with its answer.
"""
