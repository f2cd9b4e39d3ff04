"""A steered model behind OpenAI's chat-completions protocol, on this machine."""

from saelab.serving.server import Served, application, serve

__all__ = ["Served", "application", "serve"]
