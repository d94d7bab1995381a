"""Measures of what is synthesised: word errors, speaker similarity, acceptance."""
