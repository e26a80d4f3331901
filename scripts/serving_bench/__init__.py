"""Servers under measurement: how they are started, driven, compared and reported."""
