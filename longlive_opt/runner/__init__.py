"""Run presets as notebooks: plan a campaign, execute it, and report failures."""
