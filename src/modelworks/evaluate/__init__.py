"""How well a model does: retrieval over long contexts, tasks generated here, perplexity by position."""
