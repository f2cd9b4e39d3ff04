"""Building a feature index: one pass over the cache, then every latent from its own firings."""
