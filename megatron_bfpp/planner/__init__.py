"""Predicts what a job will need and how long its steps will take, before it is started."""
