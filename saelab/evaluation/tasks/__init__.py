"""Tasks that test an SAE's latents: sparse probing, SCR and TPP, absorption, two-sidedness."""
