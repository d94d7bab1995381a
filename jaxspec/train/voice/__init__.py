"""The recipe of the built-in voice: sentences, recordings, codec, target, draft. scripts/build_voice.py runs its stages."""
