"""Reads records, never torch.  `from ablab import analysis as ab` is for notebooks: see api.py."""

from ablab.analysis.api import (
    list_experiments,
    list_studies,
    plot_curves,
    plot_dynamics,
    plot_effects,
    plot_history,
    plot_importance,
    plot_map,
    plot_rates,
    plot_slices,
    plot_widths,
    read_curves,
    read_effects,
    read_runs,
    read_trials,
)

__all__ = [
    "list_experiments",
    "list_studies",
    "plot_curves",
    "plot_dynamics",
    "plot_effects",
    "plot_history",
    "plot_importance",
    "plot_map",
    "plot_rates",
    "plot_slices",
    "plot_widths",
    "read_curves",
    "read_effects",
    "read_runs",
    "read_trials",
]
