"""The product: conversations that are kept, the flow of one answer, and who may have it.

`store.ConversationStore` keeps conversations in a database; `chat.Assistant` asks an engine and stores what it says
while it says it.

`accounts.Accounts` keeps users, teams, keys and tiers, `ledger.Ledger` what was used of their limits;
`gateway.AccountAccess` is both as `serve.access.Access`, which the API asks.
"""
