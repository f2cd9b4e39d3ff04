"""Texts of several kinds that have nothing in common, on which damage and small effects are measured."""

NEUTRAL = [
    "The committee will meet again next week to discuss the budget for the coming year.",
    "Once the water boils, add the pasta and stir it now and then until it is soft.",
    "She opened the window and looked at the street, where nobody was awake yet.",
    "The function returns a list of numbers, sorted from the smallest to the largest.",
    "In 1912 the railway reached the coast, and the small harbour became a town.",
]

# Others of the same kind, on which nothing is chosen: what was chosen is measured on them.
HELD_OUT = [
    "He put the two chairs beside the wall and went to look for another lamp.",
    "The report was finished on Tuesday, although nobody had asked for it.",
    "There are several ways to do this, and most of them take less than an hour.",
]
