"""The one door: `medtrain`."""
