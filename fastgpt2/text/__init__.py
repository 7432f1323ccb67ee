"""Text to tokens: tokenizers, corpora, token shards, loaders."""
