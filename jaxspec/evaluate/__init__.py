"""Quality against speed: word error rate, speaker similarity, acceptance and speedup of each verifier on held-out sentences.

``compare.compare(plan)`` runs the evaluation, ``report.save(folder, result)`` writes it. ``recognize`` and ``similarity`` hold
the two measures and work on any waves.
"""
