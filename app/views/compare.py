import common
import streamlit as st

st.title("Compare", anchor=False)
run = common.need_run()
