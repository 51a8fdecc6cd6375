"""Using a trained model outside training."""
