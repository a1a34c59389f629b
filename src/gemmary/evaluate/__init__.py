"""Evaluation of models; so far, whether the code they write passes its tests."""
