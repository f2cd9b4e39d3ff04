"""Names under which the Steering page still asks for session, loaders and page."""
# ruff: noqa: F403

from loaders import *
from page import *
from session import *
