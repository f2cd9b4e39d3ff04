import common
import streamlit as st

st.title("Steering", anchor=False)
run = common.need_run()
