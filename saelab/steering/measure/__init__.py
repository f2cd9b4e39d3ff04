"""Measuring what an intervention does: effects, calibration, dose-response, effect sizes, attribution."""
