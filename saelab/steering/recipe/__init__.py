"""Recipes: interventions saved as a folder to share, the model they belong to, and their export to GGUF."""

from saelab.steering.recipe.gguf import export_gguf
from saelab.steering.recipe.recipe import Recipe, check_free, check_parent

__all__ = ["Recipe", "check_free", "check_parent", "export_gguf"]
