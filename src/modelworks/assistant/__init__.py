"""The product: conversations that are kept, and the flow of one answer.

`store.ConversationStore` keeps conversations in a database; `chat.Assistant` asks an engine and stores what it says
while it says it.
"""
