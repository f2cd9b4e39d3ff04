import streamlit as st

st.title("prompt")
