"""The router: page list, shared sidebar, links. Everything shown lives in views/, everything computed in saelab."""

import loaders
import memory
import page
import session
import streamlit as st

st.set_page_config(page_title="saelab", page_icon="🔬", layout="wide")

pages = {
    "Runs": [
        st.Page("views/overview.py", title="Overview", icon=":material/dashboard:", default=True),
        st.Page("views/training.py", title="Training", icon=":material/show_chart:"),
        st.Page("views/compare.py", title="Compare", icon=":material/compare_arrows:"),
    ],
    "Latents": [
        st.Page("views/features.py", title="Features", icon=":material/search:"),
        st.Page("views/latent.py", title="Latent", icon=":material/adjust:"),
        st.Page("views/map.py", title="Map", icon=":material/scatter_plot:"),
        st.Page("views/collections.py", title="Collections", icon=":material/bookmarks:"),
        st.Page("views/health.py", title="Health", icon=":material/monitor_heart:"),
    ],
    "Model": [
        st.Page("views/prompt.py", title="Prompt", icon=":material/notes:"),
        st.Page("views/attribution.py", title="Attribution", icon=":material/account_tree:"),
        st.Page("views/steering.py", title="Steering", icon=":material/tune:"),
        st.Page("views/steer_eval.py", title="Steering evaluation", icon=":material/balance:"),
    ],
    "Help": [st.Page("views/help.py", title="Help", icon=":material/keyboard:")],
}

loaders.read_only()  # before anything could be written
session.follow_link()
chosen = st.navigation(pages, position="hidden")
page.sidebar(pages)
page.html(page.style())
try:
    page.run_page(chosen)
finally:  # with the packages that the page has imported
    memory.keep("first page")
