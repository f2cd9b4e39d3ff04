import common
import streamlit as st

st.title("Features", anchor=False)
run = common.need_run()
