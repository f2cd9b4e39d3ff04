import common
import streamlit as st

st.title("Latent", anchor=False)
run = common.need_run()
