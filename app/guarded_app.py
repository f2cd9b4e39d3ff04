"""The app behind its gate: what ``saelab app --host`` serves. The token comes in the environment."""

import os

import streamlit as st
from gate import Gate
from starlette.middleware import Middleware

app = st.App("streamlit_app.py", middleware=[Middleware(Gate, token=os.environ["SAELAB_APP_TOKEN"])])
