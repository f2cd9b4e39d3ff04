"""The feature index: what every latent does, from one streaming pass over a cache."""
