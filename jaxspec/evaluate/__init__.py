"""Quality against speed: error rates, speaker similarity, naturalness, acceptance and speedup of each verifier on held-out texts.

``compare.compare(plan)`` runs the evaluation, ``report.save(folder, result)`` writes it. ``recognize``, ``similarity`` and
``naturalness`` hold the three measures of sound and work on any waves.
"""
