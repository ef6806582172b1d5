"""TDPO in trainers: from a Hugging Face model and preference pairs to a finished run."""
