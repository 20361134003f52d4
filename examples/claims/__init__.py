"""The experiment behind ``reproduce_claims.py``: data, models, runs, results, analysis and figures."""
