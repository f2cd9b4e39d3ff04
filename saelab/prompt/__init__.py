"""One text inside the model: its activations, its codes, and why each latent was selected."""
