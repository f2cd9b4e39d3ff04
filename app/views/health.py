import common
import streamlit as st

st.title("Health", anchor=False)
run = common.need_run()
