import streamlit as st

st.title("steering")
