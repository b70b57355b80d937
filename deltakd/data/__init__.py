"""From rows to packed batches: conversations, tokens, which of them are supervised, and the stream of a rank."""
