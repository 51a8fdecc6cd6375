"""The engine: it owns time (epochs, steps, saving, stopping); tasks own meaning."""
