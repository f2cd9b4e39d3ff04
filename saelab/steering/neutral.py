"""Texts of several kinds that have nothing in common, on which damage and small effects are measured."""

NEUTRAL = [
    "The committee will meet again next week to discuss the budget for the coming year.",
    "Once the water boils, add the pasta and stir it now and then until it is soft.",
    "She opened the window and looked at the street, where nobody was awake yet.",
    "The function returns a list of numbers, sorted from the smallest to the largest.",
    "In 1912 the railway reached the coast, and the small harbour became a town.",
]
