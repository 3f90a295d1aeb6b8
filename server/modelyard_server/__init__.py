"""The modelyard server: keyed models served from few devices within real memory budgets."""
