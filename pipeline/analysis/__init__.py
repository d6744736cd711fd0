"""Statistics, figures, tables and report: what the stores say."""
