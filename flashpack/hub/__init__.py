"""Packs on a Hugging Face hub: the card that describes one, sending one there, getting one from there."""
