import common
import streamlit as st

st.title("Prompt", anchor=False)
run = common.need_run()
