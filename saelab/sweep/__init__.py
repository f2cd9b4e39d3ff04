"""Sweeps: train many SAEs while reading one cache once; the grid, the runs and the table of results."""

from saelab.sweep.caches import Caches
from saelab.sweep.grid import Entry, Grid, Halving, make_grid, read_grid
from saelab.sweep.guidance import Guidance, guidance, points_of
from saelab.sweep.member import Member
from saelab.sweep.results import load_results, measure, save_results
from saelab.sweep.runner import run_sweep
from saelab.sweep.summary import load_summary, save_stability, save_summary, summarise
from saelab.sweep.tuning import Tuning
from saelab.sweep.widths import hedging_of_widths

__all__ = [
    "Caches",
    "Entry",
    "Grid",
    "Guidance",
    "Halving",
    "Member",
    "Tuning",
    "guidance",
    "hedging_of_widths",
    "load_results",
    "load_summary",
    "make_grid",
    "measure",
    "points_of",
    "read_grid",
    "run_sweep",
    "save_results",
    "save_stability",
    "save_summary",
    "summarise",
]
