"""Run presets as notebooks: plan a campaign, execute it, say what failed."""
