"""Help: the app by keyboard, what marks and colours mean, and where the files are."""

import loaders
import session
import streamlit as st

from saelab import viz

KEYS = (
    ("Tab, Shift+Tab", "next and previous control", "menu, choice of the SAE, then the page from top to bottom"),
    ("Enter, Space", "open a link, press a button, switch a toggle", ""),
    ("arrow keys in a table", "walk its cells; what belongs to the row follows", "a click on any cell does the same"),
    ("Shift+Space in a table", "choose the row, or let it go", ""),
    ("Ctrl+F in a table", "search in its cells", "⌘F on a Mac"),
    (
        "arrow keys in the text of Prompt",
        "the token before or after; up and down move by ten",
        "Home, End: first, last",
    ),
    ("↑ ↓ on Features", "the latent before or after in what was found", "N: the next without a label of yours"),
    (
        "L, B, 1 to 5, O on Features",
        "label, bookmark, rate, open the latent shown",
        "the same number again takes it back",
    ),
    ("arrow keys on a slider", "one step", "Page up and down: ten"),
    ("Ctrl+Enter in a text", "do what the button below does", "⌘Enter on a Mac"),
    ("R", "draw the page again", ""),
    ("Alt+←", "one step back; every step has its own address", "⌘[ on a Mac"),
)
MARKS = (
    ("solid line below a token", "positive activation", "orange; the stronger the tint, the stronger the activation"),
    ("dotted line below a token", "negative activation", "blue"),
    ("frame around a token", "the token that the example is about", "screen readers hear it before the text"),
    ("⏎ ⇥ ⟨U+202E⟩", "line break, tab, a character that cannot be seen", "shown so that nothing is hidden"),
    ("hollow point", "measured on training rows, not on held-out ones", "compares with no other number"),
    ("bar through a point", "95 % interval", "over held-out documents"),
    ("pale text", "made with settings that are no longer those shown", ""),
)

st.title("Help", anchor=False)
if not loaders.workspace().runs:
    session.say_empty()
st.subheader("By keyboard", anchor=False)
st.html(viz.fact_table(KEYS))
st.subheader("Marks", anchor=False)
st.html(viz.fact_table(MARKS))
st.subheader("Addresses", anchor=False)
st.markdown(
    "An address holds the SAE and what you set on the page: the latent and its pole, the search and its filters, "
    "texts, chosen runs, the latents of Steering. Copy it to come back or to share it. Texts of more than about "
    f"{session.LONGEST:,} characters and vectors made from texts have no room in it, and the page says so. An address "
    "of an SAE or a latent that is not there says so; a filter that is gone is left at its default."
)
