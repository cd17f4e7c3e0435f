"""Plots of schedules, weights, timestep densities, grids and tables, as matplotlib figures."""

from .schedules import densities_of, is_learned, plot_schedules, plot_timesteps, plot_weights
from .tables import coefficients, plot_grids, plot_table

__all__ = [
    "coefficients",
    "densities_of",
    "is_learned",
    "plot_grids",
    "plot_schedules",
    "plot_table",
    "plot_timesteps",
    "plot_weights",
]
