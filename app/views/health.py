import streamlit as st

st.title("health")
