"""What could refute the numbers on a page: those of the controls, and of other seeds of the same SAE."""

from __future__ import annotations

from typing import Any

import pandas as pd
import streamlit as st

from saelab import viz
from saelab.evaluation.report import control_rows
from saelab.evaluation.seeds import Stability
from saelab.evaluation.tasks.labels import share_reaching
from saelab.runs import Run


def controls(run: Run) -> None:
    """A table of the run's numbers beside those of its controls, or how to have one."""
    st.subheader("Beside the controls", anchor=False)
    found = run.evaluation.get("controls") or {}
    if not found:
        st.caption(
            "What an untrained SAE, a frozen dictionary, random directions, raw channels and a model with random "
            f"weights reach is not measured: `saelab evaluate {viz.visible(run.name)} --cache CACHE --controls`."
        )
        return
    names = [name for name, content in found.items() if "cannot" not in content]
    rows = [
        {"": row.name, "SAE": row.value, **{name.replace("_", " "): row.controls.get(name) for name in names}}
        for row in control_rows(run.evaluation)
    ]
    st.dataframe(
        pd.DataFrame(rows),
        hide_index=True,
        column_config={"": st.column_config.TextColumn("", pinned=True)},
        alt="The numbers of the run beside those of its controls",
    )
    for name, content in found.items():
        said = content.get("cannot") or content["what"]
        st.caption(f"{name.replace('_', ' ').capitalize()}: {viz.markdown(said)}")


def latent(run: Run, number: int, row: dict[str, Any]) -> None:
    """Whether other seeds have the latent, and how many latents of each control are labelled as well as this one."""
    lines = []
    stable = Stability.load(run.path)
    if stable is not None and number < len(stable.found):
        lines.append(stable.of(number))
    score = row.get("label_score")
    if score is not None and score == score:
        for name, content in (run.evaluation.get("controls") or {}).items():
            quantiles = ((content.get("tasks") or {}).get("labels") or {}).get("f1_quantiles")
            if quantiles:
                share = share_reaching(quantiles, float(score))
                lines.append(
                    f"{share:.0%} of the latents of the control “{name.replace('_', ' ')}” are labelled as well"
                )
    if lines:
        st.caption(viz.markdown("; ".join(lines)))
